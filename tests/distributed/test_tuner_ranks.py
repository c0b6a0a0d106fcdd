"""Costs are measured and choices made by all ranks alike; training is the same bit for bit."""

from typing import Any

import pytest
import torch

from fxzero.comm.make import make_comm
from fxzero.cost.calibrate import measure_link
from fxzero.testing import run_ranks
from tests.distributed.tuner_workers import (
    SLOW,
    disagrees,
    fails_in_capture,
    for_a_cluster,
    on_nodes,
    optimizer_seconds,
    small,
    tuned,
    untuned,
)


def assert_same_training(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["losses"] == other["losses"]
    for name, value in one["params"].items():
        assert torch.equal(value, other["params"][name]), name


@pytest.mark.parametrize(
    ("uneven", "disturb"),
    [(False, True), (True, False), *(pytest.param(each, each, marks=pytest.mark.exhaustive) for each in (False, True))],
)
def test_training_is_the_same_when_tuned(uneven: bool, disturb: bool) -> None:
    ranks = run_ranks(2, tuned, uneven, disturb)
    for one, other in zip(ranks, run_ranks(2, untuned, uneven), strict=True):
        assert_same_training(one, other)
        assert one["cluster"] is not None and other["cluster"] is None
    first, second = ranks
    assert first["cluster"] == second["cluster"]
    assert first["recipe"] == second["recipe"]
    assert first["buckets"] == second["buckets"]
    assert first["measured"]
    if disturb:
        assert first["recipe"].prefetch_bytes > 1


@pytest.mark.parametrize("across", ["replicate", pytest.param("shard", marks=pytest.mark.exhaustive)])
def test_training_on_nodes_is_the_same_when_tuned(across: str) -> None:
    ranks = run_ranks(4, on_nodes, across, True)
    for one, other in zip(ranks, run_ranks(4, on_nodes, across, False), strict=True):
        assert_same_training(one, other)
        assert one["recipe"] == ranks[0]["recipe"]
        assert one["buckets"] == ranks[0]["buckets"]
        assert one["cluster"] == ranks[0]["cluster"]
    assert ranks[0]["cluster"].inside is not None
    assert ranks[0]["measured"]
    assert ranks[0]["recipe"].prefetch_bytes > 1


def test_given_cluster_decides_without_a_measurement() -> None:
    first, second = run_ranks(2, for_a_cluster, {})
    assert first["cluster"] == SLOW
    assert first["schedule"] == second["schedule"] == run_ranks(2, for_a_cluster, {})[0]["schedule"]
    predicted, ratio = first["timing"]
    assert predicted > 0
    assert ratio >= 1.0


def test_all_is_gathered_again_when_asked_to_be() -> None:
    by_default, again = (run_ranks(2, for_a_cluster, options)[0] for options in ({}, {"reshard_after_forward": True}))
    assert "kept" in by_default["schedule"].splitlines()[0]
    assert "kept" not in again["schedule"].splitlines()[0]


def test_optimizer_is_measured_under_accumulation() -> None:
    first, second = run_ranks(2, optimizer_seconds)
    assert first == second > 0


def test_small_models_are_left_alone() -> None:
    assert run_ranks(2, small) == [True, True]


def test_rank_that_cannot_trace_stops_the_others_before_they_measure() -> None:
    assert run_ranks(2, fails_in_capture) == ["RankMismatchError", "CaptureError"]


def test_ranks_that_are_given_different_clusters_say_so() -> None:
    for error in run_ranks(2, disagrees):
        assert error.startswith("RankMismatchError")
        assert "cluster" in error


def link(rank: int, world_size: int) -> tuple[float, float, float]:
    measured = measure_link(make_comm(None, torch.device("cpu")), torch.device("cpu"))
    return measured.bytes_per_s, measured.latency_s, measured.cpu_s_per_byte


@pytest.mark.parametrize("world_size", [2, 3])
def test_link_is_measured(world_size: int) -> None:
    for bytes_per_s, latency_s, cpu_s_per_byte in run_ranks(world_size, link):
        assert 1e6 < bytes_per_s < 1e12
        assert 0 < latency_s < 1
        assert 0 < cpu_s_per_byte < 1e-5
