"""A model of transformers that leaves ranks as files, and parts of state dicts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import fxzero
from fxzero.errors import CheckpointError, FxzeroError
from tests.distributed.checkpoint_workers import build


def llama() -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, vocab_size=100, tie_word_embeddings=True, **sizes))


def save_all(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    """The full weights, which are saved as a checkpoint and for `from_pretrained`."""
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    zero = fxzero.compile(model, optimizer=optimizer)
    ids = torch.arange(32).view(2, 16) + rank
    zero(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    fxzero.save(folder / "run", zero, optimizer)
    zero.save_pretrained(folder / "one")
    zero.save_pretrained(folder / "many")
    zero.save_pretrained(folder / "many", max_shard_size="20KB")
    with pytest.raises(ValueError, match="push_to_hub would upload before"):
        zero.save_pretrained(folder / "one", push_to_hub=True)
    (folder / f"file{rank}").write_text("")
    with pytest.raises(FxzeroError if rank else OSError, match="rank 0|[Nn]ot a directory|exists"):
        zero.save_pretrained(folder / "file0")
    return zero.state_dict()


def parts_of_states(rank: int, world_size: int, folder: Path) -> None:
    """What is trained alone goes out and comes back; what is frozen stays as it is."""
    model = llama()
    for name, param in model.named_parameters():
        param.requires_grad_("mlp" in name or "embed" in name)
    zero = fxzero.compile(model)
    before = zero.state_dict(trainable_only=True)  # before there are shards, and afterwards
    ids = torch.arange(32).view(2, 16) + rank
    zero(input_ids=ids, labels=ids).loss.backward()
    state, full = zero.state_dict(trainable_only=True), zero.state_dict()
    names = [f"model.layers.0.mlp.{kind}_proj.weight" for kind in ("gate", "up", "down")]
    assert set(state) == {*names, "model.embed_tokens.weight", "lm_head.weight"} == set(before)
    assert state["lm_head.weight"] is state["model.embed_tokens.weight"]
    assert all(torch.equal(state[name], full[name]) and torch.equal(before[name], full[name]) for name in state)
    assert bool(zero.state_dict(trainable_only=True, rank0_only=True)) == (rank == 0)

    zero.load_state_dict({name: value + 1 for name, value in state.items()}, trainable_only=True)
    changed = zero.state_dict()
    assert all(torch.equal(changed[name], full[name] + (name in state)) for name in full)
    with pytest.raises(CheckpointError, match=r"missing \['model.layers.0.mlp.gate_proj.weight'\]"):
        zero.load_state_dict({n: v for n, v in state.items() if n != names[0]}, trainable_only=True)
    with pytest.raises(CheckpointError, match=r"unexpected \['model.norm.weight'\]"):
        zero.load_state_dict({**state, "model.norm.weight": full["model.norm.weight"]}, trainable_only=True)
    plain, _ = build("example", 0)
    assert isinstance(plain, nn.Module)
    plain.save_pretrained(folder / "plain.safetensors")
