"""Models that `parallelize_module` has cut train as if they were whole, sharded along the other dimension of a mesh."""

import math
from pathlib import Path
from typing import Any

import pytest

from fxzero.testing import run_ranks
from tests.distributed import tensor_parallel_plans_workers as plans
from tests.distributed import tensor_parallel_workers as workers


def test_ranks_of_both_dimensions_train_as_one_and_their_checkpoint_is_of_the_whole(tmp_path: Path) -> None:
    schedule, *_ = run_ranks(4, workers.train, str(tmp_path))
    backward = schedule.split("end of forward")[1]
    assert "all_gather_into_tensor  blocks.1" in schedule
    assert backward.count("all_reduce") >= 6  # gradients of the norms, partial sums until then
    assert "reduce_scatter          embedding.weight +16" in backward


def test_ranks_of_one_dimension_train_as_one() -> None:
    run_ranks(2, workers.train_otherwise, 1, 2)


@pytest.mark.exhaustive
def test_tied_parameters_methods_copies_and_scalers() -> None:
    run_ranks(4, workers.train_tied)


def test_parts_whose_inputs_are_prepared_train_as_one_and_go_on_with_other_ranks(tmp_path: Path) -> None:
    run_ranks(4, plans.losses, "sequences", {"dp": 2, "tp": 2}, {}, str(tmp_path), False)
    run_ranks(2, plans.losses, "sequences", {"dp": 1, "tp": 2}, {}, str(tmp_path), True)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["sequences", "outputs"])
@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ({"nodes": 2, "dp": 2, "tp": 2}, {}),
        ({"nodes": 2, "dp": 2, "tp": 2}, {"across": "shard"}),
        ({"nodes": 1, "dp": 2, "tp": 2}, {}),
        ({"nodes": 2, "dp": 1, "tp": 2}, {}),
        ({"dp": 1, "tp": 4}, {"stage": 2}),
        ({"dp": 2, "tp": 2}, {"mp_policy": plans.BF16}),
        ({"dp": 2, "tp": 2}, {"recompute": "full"}),
        ({"dp": 2, "tp": 2}, {"compute": "fused"}),
    ],
)
def test_other_meshes_and_options(name: str, sizes: dict[str, int], options: dict[str, Any], tmp_path: Path) -> None:
    run_ranks(math.prod(sizes.values()), plans.losses, name, sizes, options, str(tmp_path), False, timeout=200)


def test_what_is_not_there_beside_tensor_parallelism_is_refused(tmp_path: Path) -> None:
    run_ranks(2, workers.refused, str(tmp_path))
