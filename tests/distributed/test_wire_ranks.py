"""Collectives in narrower types on real gloo ranks: bit for bit training that rounds in the same places; bytes."""

from typing import Any

import pytest
import torch

from fxzero.errors import RankMismatchError
from fxzero.testing import RankError, run_ranks
from tests.distributed import memory_workers
from tests.distributed import wire_workers as workers

BF16, INT8 = torch.bfloat16, torch.int8
DTYPES = [(BF16, None), (None, BF16), (BF16, BF16), (INT8, None), (INT8, BF16)]
KEEP_ALL = {"max_kept_bytes": None}


@pytest.mark.parametrize(
    "name, world_size, gather_dtype, reduce_dtype",
    [*(("net", 2, *each) for each in DTYPES), ("net", 3, INT8, BF16)],
)
def test_training_equals_that_with_rounded_parameters_and_gradients(
    name: str, world_size: int, gather_dtype: torch.dtype | None, reduce_dtype: torch.dtype | None
) -> None:
    (header,) = {s.splitlines()[0] for s in run_ranks(world_size, workers.train, name, gather_dtype, reduce_dtype)}
    assert ("received as " in header) == (gather_dtype is not None)
    assert ("sent as bfloat16" in header) == (reduce_dtype is not None)


@pytest.mark.parametrize(("name", "gather_dtype"), [("mixed", BF16), ("mixed", INT8)])
def test_training_equals_the_rounded_one_for_other_models(name: str, gather_dtype: torch.dtype) -> None:
    """Parameters of three dtypes, frozen, tied, empty and unused ones; odd sizes."""
    (header,) = {s.splitlines()[0] for s in run_ranks(3, workers.train, name, gather_dtype, BF16)}
    if name == "mixed":  # whose bfloat16 buckets get no narrower by bfloat16
        assert ("received as bfloat16" if gather_dtype is BF16 else "received as int8/256") in header


@pytest.mark.parametrize("no_sync, sizes", [(False, KEEP_ALL), pytest.param(True, None, marks=pytest.mark.exhaustive)])
def test_accumulated_gradients_equal_the_rounded_ones(no_sync: bool, sizes: dict[str, Any] | None) -> None:
    arguments = {"micro_batches": 3, "no_sync": no_sync, "sizes": sizes}
    run_ranks(2, _train, "net", INT8, BF16, arguments)


@pytest.mark.parametrize("world_size", [3])
def test_interleaved_layout_can_be_cast(world_size: int) -> None:
    run_ranks(world_size, _train, "mixed", BF16, BF16, {"layout": "interleaved", "micro_batches": 2})


def _train(rank: int, world_size: int, name: str, gather_dtype: Any, reduce_dtype: Any, more: dict[str, Any]) -> str:
    return workers.train(rank, world_size, name, gather_dtype, reduce_dtype, **more)


def test_norm_is_that_of_the_reduced_gradients() -> None:
    run_ranks(2, workers.clipped)


def test_kept_buckets_are_gathered_again_in_their_type() -> None:
    run_ranks(2, workers.two_forwards_then_backwards, INT8)


def test_buckets_that_stay_train_the_same() -> None:
    run_ranks(2, memory_workers.accumulate, False, {"gather_dtype": INT8, "reduce_dtype": BF16})


@pytest.mark.parametrize("budget", [None, "auto"])
@pytest.mark.parametrize("gather_dtype", [BF16, INT8])
def test_what_is_held_is_what_was_planned_and_steady_steps_allocate_nothing(gather_dtype: Any, budget: Any) -> None:
    dtypes = {"gather_dtype": gather_dtype, "reduce_dtype": BF16}
    run_ranks(2, memory_workers.planned_and_measured, budget, False, dtypes)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_backend_that_sums_does_so_in_the_type_that_travels(micro_batches: int) -> None:
    run_ranks(3, workers.sums_in_bfloat16, micro_batches)


def test_bytes_of_messages_are_those_of_the_schedule() -> None:
    plain, bf16, int8 = [
        run_ranks(3, workers.count_bytes, *dtypes)[0] for dtypes in ((None, None), (BF16, BF16), (INT8, BF16))
    ]
    for gathered, reduced, seen in (plain, bf16, int8):
        assert gathered + reduced == seen
    assert [2 * bf16[0], 2 * bf16[1]] == [*plain[:2]]
    assert 1 / 4 < int8[0] / plain[0] < 0.26


@pytest.mark.exhaustive
def test_training_in_narrow_types_comes_near_that_in_float32() -> None:
    options = [{}, {"gather_dtype": BF16, "reduce_dtype": BF16}, {"gather_dtype": INT8, "reduce_dtype": BF16}]
    results = run_ranks(2, workers.losses, options)
    assert results[0] == results[1]
    exact, bf16, int8 = results[0]
    assert exact[-1] < 0.75 * exact[0]
    assert exact != bf16 != int8
    assert bf16[-3:] == pytest.approx(exact[-3:], rel=0.01)
    assert int8[-3:] == pytest.approx(exact[-3:], rel=0.03)


def test_ranks_with_other_types_are_named() -> None:
    with pytest.raises(RankError, match=rf"{RankMismatchError.__name__}(.|\n)*rank 0(.|\n)*torch.int8"):
        run_ranks(2, workers.disagree)
