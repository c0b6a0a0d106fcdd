"""Ranks decide together whether plans become CUDA graphs; the graphs are fakes that are never replayed."""

from __future__ import annotations

import warnings

import torch
from torch import nn

import fxzero
from fxzero.module.ranks.captures import WARM_CALLS, Captures
from fxzero.testing import engine_of, run_ranks
from tests.helpers.fake_cuda import FakeCuda


def warned(rank: int, *, is_capturable: bool, sizes: tuple[int, int]) -> list[str]:
    torch.manual_seed(0)
    zero = fxzero.compile(nn.Linear(4, 2))
    engine = engine_of(zero)
    engine.sharded.comm.is_capturable = is_capturable
    engine.captures = Captures(engine.sharded, FakeCuda())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(WARM_CALLS + 2):
            zero(torch.ones(sizes[rank], 4)).sum().backward()
    assert engine.last is not None
    assert engine.last.graphs is None
    return [str(each.message) for each in caught if "CUDA graph" in str(each.message)]


def decide(rank: int, world_size: int) -> tuple[list[str], list[str]]:
    on_gloo = warned(rank, is_capturable=False, sizes=(3, 3))
    return on_gloo, warned(rank, is_capturable=True, sizes=(3, 5))


def test_ranks_without_capture_and_ranks_with_different_plans_run_as_they_are() -> None:
    for on_gloo, different in run_ranks(2, decide):
        assert len(on_gloo) == len(different) == 1
        assert "all_gather" in on_gloo[0]
        assert "a backend other than NCCL" in on_gloo[0]
        assert "ranks run different plans: rank 0 runs with the graph" in different[0]
