"""Nodes that share the shards, on real gloo ranks."""

from typing import Any

import pytest
import torch

from fxzero.testing import run_ranks
from tests.distributed import mesh_shard_workers as workers
from tests.distributed import mesh_workers, wire_workers
from tests.distributed.test_mesh_ranks import train

SMALL = {"bucket_bytes": 8192}


@pytest.mark.parametrize(("shape", "name"), [((2, 2), "gpt"), ((2, 1), "net")])
def test_training_equals_replicated_training(shape: tuple[int, int], name: str) -> None:
    assert len(set(train(shape, name, across="shard", seed_offset=5))) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 2, "micro_batches": 2, "lengths": ((16,), (12, 16))},
        {"steps": 1, "micro_batches": 3, "no_sync": True},
        pytest.param(
            {"steps": 2, "sizes": {**SMALL, "max_kept_bytes": None}, "micro_batches": 2}, marks=pytest.mark.exhaustive
        ),
        pytest.param(
            {"steps": 2, "sizes": SMALL, "memory_budget": 1_000_000, "micro_batches": 2}, marks=pytest.mark.exhaustive
        ),
        pytest.param({"steps": 2, "layout": "interleaved", "micro_batches": 2}, marks=pytest.mark.exhaustive),
    ],
)
def test_training_is_the_same_under_other_options(options: dict[str, Any]) -> None:
    train((2, 2), "net" if "lengths" not in options else "gpt", across="shard", **options)


@pytest.mark.parametrize(
    ("across", "gather_dtype"),
    [("replicate", torch.int8), pytest.param("shard", torch.bfloat16, marks=pytest.mark.exhaustive)],
)
def test_training_with_narrow_gathers_equals_the_rounded_one(across: str, gather_dtype: torch.dtype) -> None:
    options = {"mesh_shape": (2, 2), "across": across, "micro_batches": 2}
    headers = {s.splitlines()[0] for s in run_ranks(4, _train_narrow, "net", gather_dtype, options)}
    assert len(headers) == 1 and " as " in headers.pop()


def _train_narrow(rank: int, world_size: int, name: str, gather_dtype: torch.dtype, options: dict[str, Any]) -> str:
    return wire_workers.train(rank, world_size, name, gather_dtype, None, **options)


@pytest.mark.exhaustive
def test_training_gives_the_bits_of_nodes_that_are_replicas() -> None:
    run_ranks(4, workers.train_as_replicas, (2, 2))


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("train_by_other_outputs", ()),
        ("train_with_calls_in_between", ()),
        pytest.param("accumulate_without_sync", (), marks=pytest.mark.exhaustive),
        pytest.param("fail_and_go_on", (), marks=pytest.mark.exhaustive),
        pytest.param("states", ("before",), marks=pytest.mark.exhaustive),
        pytest.param("states", ("after",), marks=pytest.mark.exhaustive),
    ],
)
def test_what_works_on_one_group_works_on_nodes_that_share_shards(name: str, args: tuple[Any, ...]) -> None:
    run_ranks(4, _on_mesh, name, args, group_timeout=10.0)


def _on_mesh(rank: int, world_size: int, name: str, args: tuple[Any, ...]) -> Any:
    return mesh_workers.on_mesh(rank, world_size, (2, 2), name, *args, across="shard")


@pytest.mark.parametrize("shape", [(2, 2), (3, 2)])
def test_reductions_are_exact_when_many_are_in_flight(shape: tuple[int, int]) -> None:
    run_ranks(shape[0] * shape[1], workers.reduce_over_nodes, shape)


@pytest.mark.parametrize("shape", [(2, 2), (2, 3)])
def test_gathers_are_exact_wherever_ranks_wait_for_them(shape: tuple[int, int]) -> None:
    run_ranks(shape[0] * shape[1], workers.gather_over_nodes, shape)


@pytest.mark.parametrize("shape", [(2, 2)])
def test_values_of_rank_0_reach_all_nodes(shape: tuple[int, int]) -> None:
    run_ranks(shape[0] * shape[1], workers.move_from_rank_0, shape)


def test_nccl_code_is_right_when_run_on_gloo() -> None:
    run_ranks(4, workers.nccl_code_on_gloo, (2, 2))


def test_gathers_in_backward_and_of_further_micro_steps_do_not_cross_nodes() -> None:
    for sent, t, text in run_ranks(4, workers.count_bytes, (2, 2), SMALL):
        inside, across = t.gathered_bytes - t.gathered_across_bytes, t.across_bytes
        reduced = across - t.gathered_across_bytes
        forward, backward, forward2, backward2, step, forward3, backward3, evaluate, change, forward4 = sent
        assert [forward[0] + backward[0], forward[1] + backward[1]] == [inside + t.reduced_bytes - reduced, across]
        assert forward[1] == t.gathered_across_bytes > 0
        assert backward == backward2 == backward3 and backward[1] == reduced > 0
        once = [line for line in text.split("---")[0].splitlines() if line.endswith("across")]
        again = [line for line in text.split("---")[2].splitlines() if line.startswith("all_gather")]
        assert len(once) > len(again) > 8 and not any(line.endswith("across") for line in again)
        assert 0 < forward2[1] < forward[1] / 5  # but for buckets that only forward gathers
        assert forward2[0] == forward[0] and forward3 == forward
        assert step == change == [0, 0]
        assert evaluate == forward4 == forward


def test_buckets_that_are_kept_cross_nodes_once_in_a_step() -> None:
    for sent, t, _ in run_ranks(4, workers.count_bytes, (2, 2), {**SMALL, "max_kept_bytes": None}):
        forward, backward, forward2 = sent[:3]
        assert forward[1] == forward2[1] == t.gathered_across_bytes
        assert backward[1] == t.across_bytes - t.gathered_across_bytes


@pytest.mark.exhaustive
def test_secondary_shards_are_in_the_report_as_they_are_in_memory() -> None:
    for rows, there, parameters, twice in run_ranks(4, workers.report_memory, (2, 2)):
        assert rows["parameters (secondary shards)"] == there == twice // 2 > parameters // 4
        assert rows["parameters (shards)"] == parameters // 4
        assert rows["gradients (shards)"] == parameters // 4


def test_secondary_shards_outlive_what_runs_between_forward_and_backward() -> None:
    run_ranks(4, workers.evaluate_between_forward_and_backward, (2, 2))


def test_new_weights_reach_the_next_micro_step() -> None:
    run_ranks(4, workers.change_weights_between_micro_steps, (2, 2))


@pytest.mark.exhaustive
def test_training_is_the_same_without_optimizations() -> None:
    options = [
        {"without": ["overlap", "buckets", "prefetch"]},
        {"without": ["persistent_buffers", "fused_norm"], "layout": "interleaved"},
    ]
    run_ranks(4, workers.train_without, (2, 2), options)


def test_a_meta_model_gets_the_same_values_on_all_nodes() -> None:
    results = run_ranks(4, workers.initialise_on_meta, (2, 2))
    assert all(all(map(_equal, each, results[0])) for each in results)


def _equal(one: Any, other: Any) -> bool:
    return bool((one == other).all())


@pytest.mark.parametrize("shape", [(2, 1), (1, 2)])
def test_one_node_and_nodes_of_one_rank_are_one_group(shape: tuple[int, int]) -> None:
    assert set(run_ranks(2, workers.train_nodes_of_one, shape)) == {"world_size=2"}


def test_nodes_that_disagree_are_named_on_every_rank() -> None:
    for error in run_ranks(4, workers.differ):
        assert error.startswith("RankMismatchError: Ranks compiled different things")
        assert "ranks 0-1: " in error and "ranks 2-3: " in error


def test_what_is_no_mesh_of_nodes_is_refused() -> None:
    texts = run_ranks(2, workers.refuse)[0]
    assert len(texts) == 2 and all(text.startswith('across="shard" is about the nodes') for text in texts)


def test_states_are_given_on_some_of_all_ranks() -> None:
    run_ranks(5, workers.give_states_on_some_ranks)
