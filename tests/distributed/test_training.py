"""Training on real gloo ranks is bitwise that of replicated training."""

from typing import Any

import pytest

from fxzero.passes import default_passes
from fxzero.testing import run_ranks
from tests.distributed import replicated

SIZES_OF_MODELS = {"mlp": (2,), "net": (1, 2, 3, 4), "gpt": (2,), "roberta": (3,)}
"""World sizes on which each model is trained; transformers are trained on other sizes by the tests further down."""
FIRST_COMPLETE_PREFIX = 4
"""The passes up to InsertReduceScatters: a graph with all its collectives, if not yet in a good order."""


@pytest.mark.parametrize(
    ("world_size", "name"), [(size, name) for name, sizes in SIZES_OF_MODELS.items() for size in sizes]
)
def test_training_equals_replicated_training(world_size: int, name: str) -> None:
    schedules = run_ranks(world_size, replicated.train, name)
    assert len(set(schedules)) == 1


@pytest.mark.parametrize("optimizer", ["sgd", "adamw_foreach", "adam_fused"])
def test_training_equals_replicated_training_for_each_kind_of_optimizer(optimizer: str) -> None:
    run_ranks(3, replicated.train, "mlp", optimizer)


@pytest.mark.parametrize(
    ("world_size", "name", "stride"), [(2, "net", 2), pytest.param(3, "mlp", 5, marks=pytest.mark.exhaustive)]
)
def test_every_prefix_of_the_passes_trains_the_same(world_size: int, name: str, stride: int) -> None:
    prefixes = range(len(default_passes()), FIRST_COMPLETE_PREFIX - 1, -stride)
    run_ranks(world_size, replicated.train_prefixes, name, prefixes, timeout=120)


@pytest.mark.parametrize("world_size", [1, 3])
def test_accumulation_over_different_micro_batches_adds_to_the_shards(world_size: int) -> None:
    run_ranks(world_size, replicated.train, "gpt", "adamw", None, 2, 2)


@pytest.mark.parametrize("world_size", [1, 3])
def test_no_sync_reduces_the_sum_of_micro_batches(world_size: int) -> None:
    run_ranks(world_size, replicated.train, "gpt", "adamw", None, 1, 3, True)


def test_ranks_may_have_different_lengths_when_rank_0_alone_meets_a_new_one() -> None:
    lengths = ((16, 16, 16), (12, 16, 16), (16, 9, 12))
    run_ranks(3, replicated.train, "gpt", "adamw", None, 3, 1, False, lengths)


def test_rank_0_wins_when_ranks_are_seeded_differently() -> None:
    run_ranks(2, replicated.train, "gpt", "adamw", None, 2, 1, False, ((16,),), 5)


@pytest.mark.parametrize("world_size", [1, 3])
def test_clipping_is_within_1e_6_of_replicated_training(world_size: int) -> None:
    run_ranks(world_size, replicated.train, "gpt", "adamw", None, 1, 1, False, ((16,),), 0, 0.01)


def test_training_is_the_same_when_buckets_are_kept_until_backward() -> None:
    sizes = {"bucket_bytes": 8192, "max_kept_bytes": None}
    run_ranks(3, replicated.train, "gpt", "adamw", None, 3, 1, False, ((16,), (12, 16)), 0, None, sizes)


@pytest.mark.parametrize(
    ("name", "recompute"), [("gpt", 20000), ("net", "full"), pytest.param("net", 20000, marks=pytest.mark.exhaustive)]
)
def test_training_is_the_same_when_activations_are_recomputed(name: str, recompute: str | int) -> None:
    sizes: dict[str, Any] = {"bucket_bytes": 8192, "recompute": recompute}
    run_ranks(2, replicated.train, name, "adamw", None, 3, 1, False, ((9, 16), (16,), (12, 16)), 0, None, sizes)


@pytest.mark.parametrize("name", ["net", pytest.param("gpt", marks=pytest.mark.exhaustive)])
def test_training_is_the_same_when_every_temporary_has_a_place(name: str) -> None:
    run_ranks(2, replicated.train_with_all_temporaries_placed, name, {"bucket_bytes": 8192})


def test_training_is_the_same_when_every_temporary_has_a_place_beside_kept_buckets() -> None:
    sizes = {"bucket_bytes": 8192, "max_kept_bytes": 40_000, "recompute": "full"}
    run_ranks(2, replicated.train_with_all_temporaries_placed, "gpt", sizes)
    run_ranks(2, replicated.two_forwards_with_all_temporaries_placed)


def test_kept_buckets_are_gathered_again_when_another_phase_ran_between() -> None:
    run_ranks(2, replicated.two_forwards_then_backwards)
