"""Dropout from the first step on is that of replicated training: compiling and measuring draw nothing."""

import pytest
import torch

from fxzero.testing import run_ranks
from tests.distributed.random_workers import compiled_and_replicated


@pytest.mark.parametrize("example", [False, True], ids=["", "example"])
def test_draws_are_those_of_replicated_training(example: bool) -> None:
    for compiled, replicated in run_ranks(2, compiled_and_replicated, example):
        for ours, theirs in zip(compiled, replicated, strict=True):
            assert torch.equal(ours, theirs)
