"""The systems that are measured, by name: fxzero, its peers, and the costs that a lower bound is made of.

A system is built by a function of (model, job) in a process of its own on each rank, where the process group is up
already, unless the system says that it sets it up itself. All start from the same weights and step a fused AdamW.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # ranks pin themselves to a core before they load torch; a driver needs none
    import torch
    from torch import Tensor, nn


class Policy(str, Enum):
    """What a system does with gathered parameters; it decides the least bytes of a step."""

    AGAIN = "again"
    """Gathers in forward, and again in backward."""
    KEEP = "keep"
    """Gathers once, keeps until backward."""
    REPLICATED = "replicated"
    """Shards nothing, averages gradients."""
    SILENT = "silent"
    """Sends nothing."""
    WIRE = "wire"
    """Only sends."""

    @property
    def trains(self) -> bool:
        """True where the loss must be that of all others."""
        return self in (Policy.AGAIN, Policy.KEEP, Policy.REPLICATED)


@dataclass(frozen=True)
class Shape:
    """Sizes of the model and of a rank's batch."""

    layers: int = 12
    hidden: int = 512
    heads: int = 8
    vocab: int = 8192
    seq: int = 128
    batch: int = 4
    """Samples of a rank per step."""


@dataclass(frozen=True)
class Job:
    """What a rank is told."""

    rank: int
    world_size: int
    shape: Shape
    simple_fsdp: str | None = None
    """The file simple_fsdp.py of torchtitan."""


def _nothing(*_: Any) -> None:
    return None


@dataclass
class Training:
    """A system made ready: the three parts of a step, which are timed apart."""

    forward: Callable[[Tensor, Tensor], Tensor]
    backward: Callable[[Tensor], object] = _nothing
    update: Callable[[], object] = _nothing
    prepare: Callable[[], object] = _nothing
    """Called before each step, off the clock."""
    facts: Callable[[], dict[str, Any]] = field(default=dict)
    """What the system says of itself."""


@dataclass(frozen=True)
class System:
    """How to build a system, and what it is."""

    build: str
    """`module:function` below benchmarks.network."""
    policy: Policy
    label: str
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    makes_group: bool = False
    """True if it sets up the process group itself."""

    @property
    def is_mixed(self) -> bool:
        """True if it computes in bf16, sums gradients in fp32, and steps shards in fp32."""
        return self.options.get("mixed", False)

    def make(self, model: nn.Module, job: Job) -> Training:
        """Take the model over."""
        module, _, name = self.build.partition(":")
        build = getattr(importlib.import_module(f"benchmarks.network.{module}"), name)
        return build(model, job, **self.options)


MIXED = {"mixed": True}
"""Compute in bf16, sums of gradients and shards in fp32."""

SYSTEMS = {
    "compute": System("baselines:compute", Policy.SILENT, "compute only (eager)"),
    "wire": System("baselines:wire", Policy.WIRE, "bare gloo loop"),
    "fxzero_stubbed": System("stubbed:stubbed", Policy.SILENT, "fxzero's code, collectives stubbed out"),
    "fxzero": System("ours:train", Policy.AGAIN, "fxzero"),
    "fxzero_keep": System("ours:train", Policy.KEEP, "fxzero, stage=2", {"stage": 2}),
    "fxzero_naive": System("ours:naive", Policy.AGAIN, "fxzero, naive schedule"),
    "ddp": System("peers:ddp", Policy.REPLICATED, "DDP"),
    "fsdp2": System("peers:fsdp2", Policy.AGAIN, "FSDP2"),
    "fsdp2_async": System("peers:fsdp2_async", Policy.AGAIN, "FSDP2, private async gathers"),
    "fsdp2_best": System("peers:fsdp2_best", Policy.AGAIN, "FSDP2, async, our reduce-scatter"),
    "ds": System("peers:deepspeed_zero3", Policy.KEEP, "DeepSpeed ZeRO-3", {"tuning": "default"}, True),
    "ds_tuned": System("peers:deepspeed_zero3", Policy.AGAIN, "DeepSpeed ZeRO-3, tuned", {"tuning": "tuned"}, True),
    "ds_deopt": System("peers:deepspeed_zero3", Policy.AGAIN, "DeepSpeed ZeRO-3, naive", {"tuning": "deopt"}, True),
    "simple_fsdp": System("peers:simple_fsdp", Policy.KEEP, "SimpleFSDP, compiled, overlap"),
    "fxzero_bf16_stubbed": System(
        "stubbed:stubbed", Policy.SILENT, "fxzero's code in bf16, collectives stubbed out", MIXED
    ),
    "fxzero_bf16": System("ours:train", Policy.AGAIN, "fxzero, bf16", MIXED),
    "fsdp2_bf16": System("peers:fsdp2", Policy.AGAIN, "FSDP2, bf16", MIXED),
    "fsdp2_async_bf16": System("peers:fsdp2_async", Policy.AGAIN, "FSDP2, bf16, private async gathers", MIXED),
    "fsdp2_best_bf16": System("peers:fsdp2_best", Policy.AGAIN, "FSDP2, bf16, async, our reduce-scatter", MIXED),
}

GROUPS = (
    ("compute", "wire", "fxzero_stubbed", "fxzero", "fxzero_keep", "ddp", "simple_fsdp", "fsdp2_best"),
    ("compute", "fxzero_naive", "fsdp2", "fsdp2_async"),
    ("compute", "ds", "ds_tuned", "ds_deopt"),
    ("compute", "fxzero_bf16_stubbed", "fxzero_bf16", "fsdp2_bf16", "fsdp2_async_bf16", "fsdp2_best_bf16"),
)
"""What is alive together, within 20 GB: the costs, fxzero and the strongest peers first."""


def adamw(params: Any) -> torch.optim.Optimizer:
    """The optimizer of all systems."""
    import torch

    return torch.optim.AdamW(params, lr=1e-4, fused=True)


def mixed_precision(*, mixed: bool) -> Any:
    """The policy of mixed precision; one that changes nothing if `mixed` is False."""
    import torch
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return MixedPrecisionPolicy(torch.bfloat16, torch.float32) if mixed else MixedPrecisionPolicy()


def plain(model: nn.Module, optimizer: torch.optim.Optimizer, **more: Any) -> Training:
    """The training loop that most systems ask for."""

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return Training(model, _backward, update, **more)


def _backward(loss: Tensor) -> None:
    loss.backward()


def scaled(training: Training, factor: float) -> Training:
    """The same for a system that sums gradients over the ranks."""
    backward = training.backward
    training.backward = lambda loss: backward(loss * factor)
    return training
