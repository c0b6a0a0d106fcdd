"""Muon, Adafactor and others that step whole parameters on real gloo ranks: bit for bit those of an unsharded model."""

from pathlib import Path
from typing import Any

import pytest

from fxzero.testing import run_ranks
from tests.distributed import whole_workers as workers


@pytest.mark.parametrize(
    ("world_size", "kind", "when", "options"),
    [
        (1, "muon", "before", {}),
        (2, "muon", "passed", {"stage": 2}),
        (3, "muon", "after", {"layout": "interleaved"}),
        (2, "adafactor", "after", {}),
        (3, "foreach", "before", {}),
        (2, "whitened", "passed", {}),
    ],
)
def test_training_equals_that_of_whole_parameters(
    world_size: int, kind: str, when: str, options: dict[str, Any]
) -> None:
    run_ranks(world_size, workers.train, kind, when, options)


@pytest.mark.parametrize(
    ("kind", "saving", "loading"),
    [("muon", 2, 3), ("adafactor", 3, 1), pytest.param("one", 3, 2, marks=pytest.mark.exhaustive)],
)
def test_state_is_that_of_an_unsharded_optimizer_at_any_number_of_ranks(
    kind: str, saving: int, loading: int, tmp_path: Path
) -> None:
    full = run_ranks(saving, workers.save, kind, tmp_path)[0]
    run_ranks(loading, workers.load, kind, tmp_path, full)


def test_gradients_on_some_ranks_alone_are_refused_on_all() -> None:
    errors = run_ranks(2, workers.refused)
    assert all("has a gradient on ranks" in error for error in errors)
