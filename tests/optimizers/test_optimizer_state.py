"""Optimizer state in one buffer, and a steady state that asks the allocator for nothing of the model's."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fxzero
from fxzero.models import GPT, GPT_PRESETS
from fxzero.optimizers.state import rehome_state
from tests.helpers.pairs import as_shard

LARGE_BYTES = 64 * 1024


class Large(nn.Module):
    """Two layers whose parameters, gradients and optimizer state are all larger than its activations."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).square().mean()


class Allocations(TorchDispatchMode):
    """Counts operators that return a new storage of 64 KiB or more."""

    def __init__(self) -> None:
        super().__init__()
        self.large: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs or {}))}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in given and storage.nbytes() >= LARGE_BYTES and not func.is_view:
                self.large.append(f"{func}: {storage.nbytes()} bytes")
        return result


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


OPTIMIZERS = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-2),
    "adamw_fused": lambda params: torch.optim.AdamW(params, lr=1e-2, fused=True),
    "sgd_momentum": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=1e-2, momentum=0.5, centered=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_lies_in_one_buffer_from_the_second_step_on_and_trains_the_same(name: str) -> None:
    torch.manual_seed(0)
    model = Large()
    reference = copy.deepcopy(model)
    zero = fxzero.compile(model)
    optimizer, other = OPTIMIZERS[name](zero.parameters()), OPTIMIZERS[name](reference.parameters())
    for step in range(4):
        x = torch.randn(3, 256, generator=torch.Generator().manual_seed(step))
        for module, each in ((zero, optimizer), (reference, other)):
            module(x).backward()
            each.step()
            each.zero_grad()
    storages = {
        value.untyped_storage().data_ptr()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor) and value.numel() > 1
    }
    assert len(storages) == 1
    for mine, theirs in zip(zero.parameters(), reference.parameters(), strict=True):
        assert torch.equal(mine, as_shard(theirs))


def test_state_of_other_parameters_is_left_alone() -> None:
    mine, theirs = nn.Parameter(torch.ones(100)), nn.Parameter(torch.ones(50))
    optimizer = torch.optim.Adam([mine, theirs])
    mine.grad, theirs.grad = torch.ones(100), torch.ones(50)
    optimizer.step()
    before = optimizer.state[theirs]["exp_avg"]
    assert rehome_state(optimizer, {id(mine)}) == 2 * 512
    assert optimizer.state[theirs]["exp_avg"] is before


def test_nothing_large_is_allocated_after_the_warm_up() -> None:
    zero = fxzero.compile(Large())
    optimizer = torch.optim.AdamW(zero.parameters(), fused=True)
    x = torch.randn(3, 256)

    def step() -> None:
        zero(x).backward()
        zero.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        step()
    with Allocations() as steady:
        step()
    assert steady.large == []
    with Allocations() as eager:
        Large()(x).backward()
    assert len(eager.large) >= 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_allocator_is_asked_for_no_segment_after_the_warm_up() -> None:
    torch.manual_seed(0)
    zero = fxzero.compile(GPT(GPT_PRESETS["mini"]), device="cuda")
    optimizer = torch.optim.AdamW(zero.parameters(), fused=True)
    ids = torch.randint(0, 4096, (4, 128), device="cuda")

    def step() -> None:
        zero(input_ids=ids, labels=ids).loss.backward()
        zero.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()

    def stats() -> dict[str, int]:
        torch.cuda.synchronize()
        now = torch.cuda.memory_stats()
        names = ("num_device_alloc", "segment.all.allocated", "reserved_bytes.all.current")
        return {name: now[name] for name in (*names, *failures)}

    failures = ("num_alloc_retries", "num_ooms")
    before = torch.cuda.memory_stats()  # empty before CUDA is used
    for _ in range(3):
        step()
    warm = stats()
    for _ in range(5):
        step()
        assert stats() == warm
    assert warm["num_device_alloc"] > 0
    assert all(warm[name] == before.get(name, 0) for name in failures)
