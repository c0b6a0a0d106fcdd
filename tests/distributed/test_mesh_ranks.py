"""Sharding inside nodes that are replicas of each other, on real gloo ranks."""

from typing import Any

import pytest
import torch

from fxzero.testing import run_ranks
from tests.distributed import mesh_workers, replicated

NODES = [(2, 2), (2, 1), (3, 1)]


def train(shape: tuple[int, int], name: str, **options: Any) -> list[str]:
    """`replicated.train` on a mesh: bit for bit replicated training, summed inside nodes and then over them."""
    return run_ranks(shape[0] * shape[1], _train, name, {**options, "mesh_shape": shape})


def _train(rank: int, world_size: int, name: str, options: dict[str, Any]) -> str:
    return replicated.train(rank, world_size, name, **options)


@pytest.mark.parametrize(
    ("shape", "name"), [((2, 2), "gpt"), ((1, 2), "net"), pytest.param((3, 1), "net", marks=pytest.mark.exhaustive)]
)
def test_training_on_a_mesh_equals_replicated_training(shape: tuple[int, int], name: str) -> None:
    assert len(set(train(shape, name, seed_offset=5))) == 1


def test_accumulation_adds_to_the_shards_of_all_nodes() -> None:
    train((2, 2), "net", steps=2, micro_batches=2)


def test_no_sync_reduces_sums_over_nodes() -> None:
    train((2, 2), "net", steps=1, micro_batches=3, no_sync=True)


@pytest.mark.parametrize("shape", [(2, 2)])
def test_the_norm_on_a_mesh_is_that_of_replicated_training(shape: tuple[int, int]) -> None:
    train(shape, "net", steps=1, clip=0.01)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2, 2), {"sizes": {"bucket_bytes": 8192, "max_kept_bytes": None}, "lengths": ((16,), (12, 16))}),
        ((2, 2), {"sizes": {"bucket_bytes": 8192}, "memory_budget": 1_000_000, "micro_batches": 2}),
        pytest.param(
            (2, 1),
            {"sizes": {"bucket_bytes": 8192}, "memory_budget": 1_000_000, "micro_batches": 2},
            marks=pytest.mark.exhaustive,
        ),
        pytest.param((2, 2), {"layout": "interleaved"}, marks=pytest.mark.exhaustive),
        pytest.param((2, 1), {"num_passes": 4}, marks=pytest.mark.exhaustive),
    ],
)
def test_training_on_a_mesh_is_the_same_under_other_options(shape: tuple[int, int], options: dict[str, Any]) -> None:
    train(shape, "gpt" if "lengths" in options else "net", steps=2, **options)


@pytest.mark.parametrize(
    ("shape", "name", "args"),
    [
        ((2, 1), "train_by_other_outputs", ()),
        ((2, 1), "train_with_flags", (1,)),
        pytest.param((2, 2), "train_with_calls_in_between", (), marks=pytest.mark.exhaustive),
        pytest.param((2, 1), "accumulate_without_sync", (), marks=pytest.mark.exhaustive),
        pytest.param((2, 2), "fail_and_go_on", (), marks=pytest.mark.exhaustive),
        pytest.param((2, 2), "states", ("before",), marks=pytest.mark.exhaustive),
        pytest.param((2, 1), "states", ("after",), marks=pytest.mark.exhaustive),
    ],
)
def test_what_works_on_one_group_works_on_a_mesh(shape: tuple[int, int], name: str, args: tuple[Any, ...]) -> None:
    run_ranks(shape[0] * shape[1], mesh_workers.on_mesh, shape, name, *args, group_timeout=10.0)


@pytest.mark.parametrize("shape", [(2, 2)])
def test_replicas_have_the_same_bits_after_several_steps(shape: tuple[int, int]) -> None:
    results = run_ranks(shape[0] * shape[1], mesh_workers.replicas, shape)
    for rank, (shards, everywhere) in enumerate(results):
        of_node_0, of_rank_0 = results[rank % shape[1]][0], results[0][1]
        assert len(shards) > 0 and all(map(torch.equal, shards, of_node_0))
        assert all(map(torch.equal, everywhere, of_rank_0))


@pytest.mark.parametrize("shape", NODES)
def test_reductions_over_nodes_are_exact_when_many_are_in_flight(shape: tuple[int, int]) -> None:
    run_ranks(shape[0] * shape[1], mesh_workers.reduce_over_nodes, shape)


@pytest.mark.parametrize("num_nodes", [2, 3, 4])
def test_nodes_sum_in_their_order_whatever_the_size(num_nodes: int) -> None:
    run_ranks(num_nodes, mesh_workers.reduce_in_parts)


@pytest.mark.parametrize("shape", [(2, 2), (2, 1)])
def test_values_of_rank_0_reach_all_nodes(shape: tuple[int, int]) -> None:
    run_ranks(shape[0] * shape[1], mesh_workers.move_from_rank_0, shape)


@pytest.mark.parametrize("shape", [(2, 2), (2, 1)])
def test_nccl_code_of_a_mesh_is_right_when_run_on_gloo(shape: tuple[int, int]) -> None:
    run_ranks(shape[0] * shape[1], mesh_workers.nccl_code_on_gloo, shape)


@pytest.mark.parametrize("shape", [(2, 2), (2, 1), (4, 1)])
def test_the_schedule_says_what_is_sent_inside_and_across(shape: tuple[int, int]) -> None:
    for sent, planned, header in run_ranks(shape[0] * shape[1], mesh_workers.count_bytes, shape):
        assert sent == planned
        assert header.startswith(f"world_size={shape[0] * shape[1]} ({shape[0]} nodes of {shape[1]})")


def test_a_meta_model_gets_the_same_values_on_all_nodes() -> None:
    results = run_ranks(4, mesh_workers.initialise_on_meta)
    assert all(all(map(torch.equal, each, results[0])) for each in results)


def test_a_mesh_of_some_ranks_leaves_the_others_out() -> None:
    sums = run_ranks(3, mesh_workers.train_in_part_of_the_ranks)
    assert sums[0] == sums[2]
    assert sums[1] == "InputMismatchError: This rank is no member of the mesh. Compile on its members only."


def test_parts_of_a_larger_mesh_are_meshes() -> None:
    for text in run_ranks(4, mesh_workers.use_part_of_a_larger_mesh):
        assert text.startswith("world_size=4 (2 nodes of 2); world_size=2; mesh has 3 dimensions; it must have")


def test_a_mesh_that_cannot_be_used_is_refused() -> None:
    both, elsewhere = run_ranks(2, mesh_workers.refuse)[0]
    assert both == "Pass mesh or process_group, not both: the mesh says which ranks shard."
    assert elsewhere.startswith("InputMismatchError: The mesh is one of cuda devices; the model is trained on cpu.")


@pytest.mark.parametrize(("how", "line"), [("model", "parameter weight"), ("mesh", "world size")])
def test_nodes_that_differ_are_named_on_every_rank(how: str, line: str) -> None:
    for error in run_ranks(4, mesh_workers.differ_between_nodes, how):
        assert error.startswith("RankMismatchError: Ranks compiled different things")
        assert "ranks 0-1: " in error and "ranks 2-3: " in error and line in error
