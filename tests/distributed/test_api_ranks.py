"""The trained module on real gloo ranks: every kind of call in any order, weights in and out, clipping."""

import math

import pytest

from fxzero.testing import run_ranks
from tests.distributed import api_workers


def test_gradients_of_other_outputs_are_those_of_replicated_training() -> None:
    run_ranks(3, api_workers.train_by_other_outputs)


@pytest.mark.parametrize("bucket_bytes", [1, 2**20])
def test_flags_may_reach_different_parameters_in_each_micro_batch(bucket_bytes: int) -> None:
    run_ranks(2, api_workers.train_with_flags, bucket_bytes)


def test_calls_in_between_leave_training_as_it_is() -> None:
    run_ranks(3, api_workers.train_with_calls_in_between)


def test_training_goes_on_after_every_rank_failed_inside_a_step() -> None:
    run_ranks(3, api_workers.fail_and_go_on, group_timeout=10.0)


@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_the_norm_is_the_same_on_all_ranks_also_where_shards_are_empty(norm_type: float) -> None:
    results = run_ranks(4, api_workers.clip, norm_type)
    assert len({norm for norm, _, _ in results}) == 1
    assert results[0][0] == pytest.approx(results[0][1], rel=1e-6)
    assert max(num_empty for _, _, num_empty in results) > 0


def test_a_late_backward_is_refused_on_every_rank() -> None:
    errors = run_ranks(4, api_workers.refuse_late_backward)
    assert len(set(errors)) == 1
    assert "parameters changed between this forward and its backward" in errors[0]


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("when", ["before", "after"])
def test_state_dicts_are_rank_0s_on_all_ranks(world_size: int, when: str) -> None:
    sums = run_ranks(world_size, api_workers.states, when)
    assert all(each == sums[0] for each in sums)


@pytest.mark.parametrize("world_size", [2, 4])
def test_weights_come_and_go_in_the_memory_of_the_result_and_one_bucket(world_size: int) -> None:
    shards = 8 / world_size
    for rank, peaks in enumerate(run_ranks(world_size, api_workers.measure_memory)):
        assert peaks["initialise"] <= 2 * shards + 1.1, peaks  # of parameters and of gradients
        assert peaks["load on meta"] <= 2 * shards + 1.1, peaks
        assert peaks["state_dict"] <= 9.1, peaks
        assert peaks["rank0_only"] <= (9.1 if rank == 0 else 0.1), peaks
        assert peaks["load"] <= 0.1, peaks


def test_no_sync_adds_up_what_different_micro_batches_reach() -> None:
    run_ranks(3, api_workers.accumulate_without_sync)


def test_a_process_group_of_some_ranks() -> None:
    run_ranks(3, api_workers.train_in_a_subgroup, (2, 1))


def test_equal_seeds_are_trusted_where_the_user_says_so() -> None:
    run_ranks(2, api_workers.trust_equal_seeds)


def test_two_compiled_modules_with_the_same_names_train_against_each_other() -> None:
    sums = run_ranks(2, api_workers.train_against_each_other)
    assert sums[0] == sums[1]


def test_a_sharded_grad_scaler_skips_the_step_on_all_ranks() -> None:
    assert run_ranks(2, api_workers.scale_gradients) == [[True, False, True]] * 2


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_parameter_without_elements_may_be_alone_in_its_bucket(world_size: int) -> None:
    run_ranks(world_size, api_workers.train_with_an_empty_parameter)


def test_layers_may_be_unfrozen_under_a_memory_budget() -> None:
    run_ranks(2, api_workers.unfreeze_under_a_budget)
