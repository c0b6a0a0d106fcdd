"""The harness itself: results, failures, deaths and hangs of ranks."""

import os
import time

import pytest
import torch.distributed as dist

from fxzero.testing import RankError, run_ranks


def behave(rank: int, world_size: int, how: str) -> int:
    assert (dist.get_rank(), dist.get_world_size()) == (rank, world_size)
    if rank == 1:
        if how == "raise":
            raise KeyError("the cause")
        if how == "die":
            os._exit(7)
        if how == "hang":
            time.sleep(100)
    if how != "return":
        dist.barrier()
    return rank * 10


@pytest.mark.parametrize(
    ("how", "text"), [("raise", "KeyError: 'the cause'"), ("die", r"rank 1 of 2 failed:\nit died with exit code 7")]
)
def test_a_failure_is_shown_and_the_next_run_works(how: str, text: str) -> None:
    with pytest.raises(RankError, match=text):
        run_ranks(2, behave, how)
    assert run_ranks(2, behave, "return") == [0, 10]


def test_a_hang_is_shown_with_its_stack() -> None:
    with pytest.raises(RankError, match=r"did not finish in time:\n(.|\n)*rank 1:\n(.|\n)*in behave"):
        run_ranks(2, behave, "hang", timeout=1.0)
