"""Ranks that differ, fail or die: the others stop within seconds, with the rank and the reason."""

import pytest

from fxzero.testing import run_ranks
from tests.distributed import error_workers

DIFFERENCES = {
    "shape": ("parameter head.weight: torch.float32 5x8 ", "parameter head.weight: torch.float32 4x8 "),
    "dtype": ("torch.float32 8x6 trained", "torch.float64 8x6 trained"),
    "frozen": ("parameter norm.weight: torch.float32 8 trained", "parameter norm.weight: torch.float32 8 frozen"),
    "parameter": ("", "parameter more."),
    "passes": ("BucketAllGathers(", "BucketAllGathers(bucket_bytes=1"),
    "layout": ("option layout: contiguous", "option layout: interleaved"),
    "without": ("option without: nothing", "option without: fused_norm"),
    "memory_budget": ("option memory_budget: None", "option memory_budget: 1048576"),
    "sync_init": ("option sync_init: True", "option sync_init: False"),
}


@pytest.mark.parametrize("how", DIFFERENCES)
@pytest.mark.parametrize("when", ["call", "example", "state_dict"])
def test_what_rank_1_compiled_differently_is_named_on_every_rank(how: str, when: str) -> None:
    errors = run_ranks(2, error_workers.differ, how, when)
    assert errors[0] == errors[1]
    assert errors[0].startswith("RankMismatchError: Ranks compiled different things")
    assert "rank 0: " in errors[0] and "rank 1: " in errors[0]


@pytest.mark.parametrize("how", DIFFERENCES)
def test_the_first_difference_is_the_one_that_was_made(how: str) -> None:
    lines = run_ranks(3, error_workers.differ, how, "state_dict")[2].splitlines()
    here, there = DIFFERENCES[how]
    assert here in next(line for line in lines if "ranks 0, 2: " in line)
    assert there in next(line for line in lines if "rank 1: " in line)


@pytest.mark.parametrize("when", ["compile", "first call", "first eval"])
def test_a_rank_that_fails_stops_those_that_wait_for_it(when: str) -> None:
    errors = run_ranks(3, error_workers.fail_alone, when)
    cause = "OptimizerError: LBFGS cannot" if when == "compile" else "CaptureError: aten._local_scalar_dense"
    assert errors[1].startswith(cause)
    for error in (errors[0], errors[2]):
        assert error.startswith(f"RankMismatchError: rank 1 failed: {cause}")


def test_a_shape_that_needs_other_collectives_is_refused_on_its_rank() -> None:
    errors = run_ranks(3, error_workers.meet_another_order, group_timeout=3.0)
    assert errors[1].startswith("PlanError: rank 1: this call needs other collectives than the first one of its mode")
    assert "extra.weight" in errors[1]
    for error in (errors[0], errors[2]):
        assert error.startswith("CommunicationError: Rank") and "bucket" in error


@pytest.mark.parametrize("where", ["between", "inside"])
def test_a_rank_that_died_is_noticed_by_the_others(where: str) -> None:
    errors = run_ranks(3, error_workers.lose_a_rank, where, dies=(1,), group_timeout=8.0)
    for error in (errors[0], errors[2]):
        assert error.startswith("CommunicationError: Rank") and "did not complete the" in error
        assert "restart from a checkpoint" in error


def test_a_rank_that_never_comes_is_named() -> None:
    errors = run_ranks(3, error_workers.skip_a_rank)
    for error in (errors[0], errors[2]):
        assert "Rank 1 did not come to compare the layout within 1 s" in error


def test_parameters_that_others_sharded_are_refused() -> None:
    errors = run_ranks(2, error_workers.compile_distributed_tensors)
    assert all("is a DTensor. Only plain tensors can be sharded" in error for error in errors)


def test_a_rank_outside_the_process_group_is_told() -> None:
    errors = run_ranks(3, error_workers.use_wrong_groups)
    assert errors[0] == errors[2] == "nothing"
    assert errors[1].startswith("InputMismatchError: This rank is no member of the process group")
