"""Collectives that the model itself runs: in the schedule, in the order that ranks agree on, never recomputed."""

from typing import Any

import pytest

from fxzero.testing import run_ranks
from tests.distributed import collective_workers

FORWARD = ["all_to_all_single", "wait_tensor", "all_reduce", "wait_tensor"]


@pytest.mark.parametrize("recompute", ["none", "full", 0])
def test_they_train_like_eager_ranks_and_are_never_recomputed(recompute: Any) -> None:
    (schedule, order, count), (other, other_order, _) = run_ranks(2, collective_workers.train, recompute)
    assert schedule == other and order == other_order
    assert count == 3 * (len(FORWARD) + 2)
    forward, _, backward = schedule.partition("--- end of forward ---")
    lines = [line.split()[:2] for line in forward.splitlines() if line.split()[0] in FORWARD]
    assert lines == [[name, f"blocks.{index}"] for index in range(3) for name in FORWARD]
    assert [line.split()[0] for line in backward.splitlines() if line.split()[:1] and line.split()[0] in FORWARD] == [
        "all_to_all_single",
        "wait_tensor",
    ] * 3


def test_the_bytes_that_they_send_are_printed() -> None:
    schedule, _, _ = run_ranks(2, collective_workers.train, "none")[0]
    line = next(line for line in schedule.splitlines() if line.startswith("all_to_all_single"))
    assert line.split() == ["all_to_all_single", "blocks.0", "512", "B"]


def test_they_are_in_the_order_that_ranks_agree_on() -> None:
    _, order, _ = run_ranks(2, collective_workers.train, "none")[0]
    of_model = [line for line in order if " of blocks." in line]
    assert of_model[:2] == ["all_to_all_single of blocks.0", "all_reduce of blocks.0"]
    assert len(of_model) == 3 * 3
    assert order[0].startswith("all_gather blocks.0.first.weight") and order[-1].startswith("reduce_scatter")


def test_ranks_whose_models_run_different_ones_are_told_so() -> None:
    for message in run_ranks(2, collective_workers.disagree):
        assert "all_to_all_single of blocks.2" in message


def test_a_parameter_that_is_sent_is_released_behind_the_wait() -> None:
    schedule = run_ranks(2, collective_workers.send_a_parameter)[0].splitlines()
    starts = [line.split()[:2] for line in schedule]
    assert starts.index(["release", "first.weight"]) == starts.index(["wait_tensor", "(model)"]) + 1


def test_the_result_of_each_pass_can_be_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXZERO_CHECK", "1")
    run_ranks(2, collective_workers.train, "full")


def test_collectives_that_write_into_their_arguments_give_what_they_give_in_eager() -> None:
    run_ranks(2, collective_workers.write_across_ranks, ["all_gather", "all_reduce", "scatter"])


@pytest.mark.exhaustive
def test_all_collectives_that_write_into_their_arguments() -> None:
    calls = ["all_gather", "all_reduce", "broadcast", "scatter", "reduce_scatter", "all_to_all_single", "with backward"]
    calls.append("reduce_scatter in another group")
    run_ranks(3, collective_workers.write_across_ranks, calls)


def test_a_barrier_in_forward_is_refused() -> None:
    run_ranks(2, collective_workers.wait_for_others)
