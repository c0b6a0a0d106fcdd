"""Predicted seconds beside measured ones, on real gloo ranks."""

import re

import pytest

from fxzero.testing import run_ranks
from tests.distributed import measured_workers
from tests.distributed.tuner_workers import SLOW

LATE_S = 0.05


@pytest.mark.parametrize("with_costs", [False, True])
def test_each_line_has_its_milliseconds(with_costs: bool) -> None:
    options = {"cluster": SLOW} if with_costs else {}
    texts = run_ranks(2, measured_workers.run, options, LATE_S)
    for before, between, after in texts:
        header = after.splitlines()[1].split()
        assert header == ["predicted", "ms"] * with_costs + ["measured", "ms", "blocked", "ms"]
        assert "measured: 0 steps; print this again after 8 more" in before
        assert "measured: 3 steps; print this again after 5 more" in between
        assert "steps; print this again" not in after
        assert ("forward and backward: predicted" in after) == with_costs
        assert "of which waits blocked" in after
        assert ("predicted" in before) == with_costs


def test_a_wait_for_a_rank_that_is_late_blocks() -> None:
    (_, _, of_early), (_, _, of_late) = run_ranks(2, measured_workers.run, {}, LATE_S)
    assert blocked_ms(of_early) > 1e3 * LATE_S / 2
    assert blocked_ms(of_late) < blocked_ms(of_early)


def blocked_ms(text: str) -> float:
    """The milliseconds of all waits: the last column of their lines."""
    waits = [line for line in text.splitlines() if line.startswith("wait")]
    columns = [re.findall(r"(\d+\.\d+)", line) for line in waits]
    return sum(float(numbers[-1]) for numbers in columns if len(numbers) == 2)


def test_no_sync_evaluation_and_kept_buckets_are_measured() -> None:
    for numbers in run_ranks(2, measured_workers.other_kinds):
        assert len(numbers) == 3
