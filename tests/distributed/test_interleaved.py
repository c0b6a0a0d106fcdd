"""The interleaved layout on real gloo ranks: bit for bit the training of the contiguous one, and its copies counted."""

import math

import pytest

from fxzero.passes import default_passes
from fxzero.testing import run_ranks
from tests.distributed import interleaved_workers as workers
from tests.distributed import replicated
from tests.distributed.test_training import FIRST_COMPLETE_PREFIX

KEEP_ALL = {"bucket_bytes": 8192, "max_kept_bytes": None}


@pytest.mark.parametrize(
    ("world_size", "name"),
    [
        (1, "mixed"),
        (3, "gpt"),
        (2, "net"),
        pytest.param(2, "mixed", marks=pytest.mark.exhaustive),
        pytest.param(3, "mlp", marks=pytest.mark.exhaustive),
        pytest.param(3, "mixed", marks=pytest.mark.exhaustive),
    ],
)
def test_training_equals_replicated_training(world_size: int, name: str) -> None:
    (header,) = {schedule.splitlines()[0] for schedule in run_ranks(world_size, workers.train, name)}
    assert ("interleaved: " in header) == (world_size > 1)


@pytest.mark.parametrize("optimizer", ["adamw_foreach", "adam_fused"])
def test_training_equals_replicated_training_for_each_kind_of_optimizer(optimizer: str) -> None:
    run_ranks(3, workers.train, "mlp", optimizer)


@pytest.mark.exhaustive
def test_every_prefix_of_the_passes_trains_the_same() -> None:
    prefixes = range(len(default_passes()), FIRST_COMPLETE_PREFIX - 1, -4)
    run_ranks(3, replicated.train_prefixes, "net", prefixes, "interleaved", timeout=120)


@pytest.mark.parametrize(("world_size", "no_sync"), [(2, True), pytest.param(3, False, marks=pytest.mark.exhaustive)])
def test_both_layouts_accumulate_the_same_gradients_bit_for_bit(world_size: int, no_sync: bool) -> None:
    run_ranks(world_size, workers.both_layouts, "mixed", no_sync)


@pytest.mark.parametrize("world_size", [3])
def test_clipping_by_the_largest_element_is_the_same_in_both_layouts_bit_for_bit(world_size: int) -> None:
    results = run_ranks(world_size, workers.both_layouts, "mixed", False, math.inf)
    assert all(norms == results[0] and len(norms) == 6 and norms[0::2] == norms[1::2] for norms in results)


@pytest.mark.exhaustive
def test_the_norm_differs_between_layouts_by_the_order_of_its_sum_only() -> None:
    results = run_ranks(2, workers.both_layouts, "gpt", False, 2.0)
    assert all(norms == results[0] for norms in results)
    assert results[0][0::2] == pytest.approx(results[0][1::2], rel=1e-6)


@pytest.mark.exhaustive
def test_buckets_kept_until_backward_train_the_same() -> None:
    run_ranks(2, workers.both_layouts, "gpt", False, None, KEEP_ALL)


def test_kept_buckets_are_gathered_again_when_another_phase_ran_between() -> None:
    """With little in flight, so that gathers share staging bytes, which must be copied out in between."""
    run_ranks(2, replicated.two_forwards_then_backwards, "interleaved", 8192)


@pytest.mark.parametrize("bucket_bytes", [1, pytest.param(2**20, marks=pytest.mark.exhaustive)])
def test_flags_may_reach_different_parameters_in_each_micro_batch(bucket_bytes: int) -> None:
    run_ranks(2, workers.train_pair, bucket_bytes)


@pytest.mark.parametrize("world_size", [1, 3])
def test_weights_move_between_layouts(world_size: int) -> None:
    run_ranks(world_size, workers.move_weights)


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_copies_of_a_step_are_those_that_its_schedule_counts(world_size: int) -> None:
    for counted, seen in run_ranks(world_size, workers.count_copies):
        assert counted == seen > 0
