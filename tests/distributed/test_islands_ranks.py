"""Models with islands on several ranks, which train as replicas do."""

from typing import Any

import pytest

from fxzero.passes import default_passes
from fxzero.testing import run_ranks
from tests.distributed import islands_workers
from tests.helpers.island_models import CASES

BUCKETS = {"passes": default_passes(bucket_bytes=600, prefetch_bytes=1200, reduce_bytes=1200)}


@pytest.mark.parametrize("name", CASES)
def test_training_is_that_of_replicas(name: str) -> None:
    run_ranks(2, islands_workers.train, name, {})


@pytest.mark.parametrize(
    ("name", "options", "arguments"),
    [
        ("experts", BUCKETS, {"micro_batches": 2}),
        ("buffers and draws", BUCKETS, {"micro_batches": 2, "no_sync": True}),
        ("experts", {}, {"micro_batches": 2, "no_sync": True, "clip": 0.1}),
        ("layers of one kind", {"recompute": "full"}, {"clip": 0.1}),
        pytest.param("layers of one kind", {"stage": 2}, {"frozen": "part.1"}, marks=pytest.mark.exhaustive),
        pytest.param("a tied weight", {"memory_budget": 2**20}, {"micro_batches": 2}, marks=pytest.mark.exhaustive),
        ("an input read again", {"layout": "interleaved"}, {"autocast": True}),
    ],
)
def test_training_under_options_is_that_of_replicas(
    name: str, options: dict[str, Any], arguments: dict[str, Any]
) -> None:
    run_ranks(3, islands_workers.train, name, options, *_positional(arguments))


def _positional(arguments: dict[str, Any]) -> list[Any]:
    defaults = {"micro_batches": 1, "no_sync": False, "clip": None, "frozen": "", "autocast": False}
    return [*(defaults | arguments).values()]


def test_an_expert_that_any_rank_reaches_has_a_gradient_on_all() -> None:
    for reached, held in run_ranks(2, islands_workers.idle_on_one_rank):
        assert reached == [fqn for fqn in held if fqn.split(".")[2] in "01"]
