"""The systems that are measured, by name: `fxzero_fused_graph:bf16` is fxzero with two options, weights of bfloat16.

eager, compile, compile_ro       PyTorch; torch.compile, by default and with mode="reduce-overhead"
ddp, fsdp2, fsdp2compile         in a process group; the last compiles each block
fxzero, with _stage2, _fused, _graph

fp32     everything              bf16    weights of bfloat16
auto     autocast of fp32 weights; fxzero gathers in bfloat16 where there is somebody to gather from
mp       a MixedPrecisionPolicy: parameters of bfloat16, sums of float32
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import fxzero
from fxzero.models import GPT, GPT_PRESETS, LLAMA_PRESETS, Llama

MODELS = ("gpt", "llama")
_POLICY = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


@dataclass(frozen=True)
class Work:
    """A model and the size of its batch."""

    model: str
    batch: int
    tokens: int
    is_toy: bool = False

    def build(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """GPT-2 medium, a Llama of 1.06 billion parameters, or toys of both."""
        torch.manual_seed(0)
        with device:
            if self.model == "gpt":
                return GPT(replace(GPT_PRESETS["tiny" if self.is_toy else "medium"], dropout=0.0)).to(dtype)
            if self.is_toy:
                return Llama(LLAMA_PRESETS["tiny"]).to(dtype)
            sizes: dict[str, Any] = {
                "hidden_size": 2048,
                "ffn_size": 5504,
                "num_layers": 20,
                "num_heads": 16,
                "num_kv_heads": 8,
            }
            return Llama(replace(LLAMA_PRESETS["7b"], **sizes)).to(dtype)

    def data(self, model: nn.Module, device: torch.device, seed: int) -> dict[str, Tensor]:
        """A batch of random tokens."""
        generator = torch.Generator().manual_seed(seed)
        vocab = cast(Any, model).config.vocab_size
        ids = torch.randint(0, vocab, (self.batch, self.tokens), generator=generator).to(device)
        return {"input_ids": ids, "labels": ids}


@dataclass(frozen=True)
class Run:
    """A model that is ready to be trained, and what surrounds its forward."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    clip: Callable[[], object]
    around: Callable[[], AbstractContextManager[Any]] = nullcontext

    def step(self, data: dict[str, Tensor]) -> Tensor:
        """One step of training; the loss."""
        with self.around():
            loss = self.model(**data).loss
        loss.backward()
        self.clip()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss


def make(name: str, work: Work, device: torch.device) -> Run:
    """A system by its name.

    Raises:
        ValueError: there is none of that name.
    """
    base, _, kind = name.partition(":")
    model = work.build(device, torch.bfloat16 if kind == "bf16" else torch.float32)
    around = partial(torch.autocast, device.type, torch.bfloat16) if kind == "auto" else nullcontext
    if base.startswith("fsdp2"):
        policy = _POLICY if kind == "mp" else MixedPrecisionPolicy()
        for block in cast(Any, model).layers:
            fully_shard(block, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    clip = partial(torch.nn.utils.clip_grad_norm_, list(model.parameters()), 1.0)
    if base.startswith("fxzero"):
        zero = fxzero.compile(model, optimizer=optimizer, **_options(base, kind))
        return Run(zero, optimizer, partial(zero.clip_grad_norm_, 1.0), around)
    if base == "fsdp2compile":
        for block in cast(Any, model).layers:
            block.compile()
    elif base == "ddp":
        model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    elif base in ("compile", "compile_ro"):
        mode = "reduce-overhead" if base == "compile_ro" else None
        return Run(cast(nn.Module, torch.compile(model, mode=mode)), optimizer, clip, around)
    elif base not in ("eager", "fsdp2"):
        raise ValueError(f"There is no system {name!r}.")
    return Run(model, optimizer, clip, around)


def _options(base: str, kind: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for part in base.split("_")[1:]:
        options |= {"stage2": {"stage": 2}, "fused": {"compute": "fused"}, "graph": {"cuda_graph": True}}[part]
    if kind == "mp":
        options["mp_policy"] = _POLICY
    if kind == "auto" and dist.is_initialized() and dist.get_world_size() > 1:
        options["gather_dtype"] = torch.bfloat16
    return options
