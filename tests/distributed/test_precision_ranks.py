"""Precision policies on real gloo ranks: bit for bit replicated training that casts in the same places; FSDP2."""

from typing import Any

import pytest
import torch

from fxzero.errors import RankMismatchError
from fxzero.testing import RankError, run_ranks
from tests.distributed import policies_workers
from tests.distributed import precision_workers as workers
from tests.distributed.precision_workers import BF16, FP32, Policy

FP16 = torch.float16


def _train(rank: int, world_size: int, name: str, policy: Policy, options: dict[str, Any]) -> str:
    return workers.train(rank, world_size, name, policy, **options)


@pytest.mark.parametrize(
    ("world_size", "name", "policy", "options"),
    [
        (1, "odd", Policy(BF16, FP32), {"micro_batches": 2}),
        (1, "odd", Policy(None, FP32), {"micro_batches": 2, "own": BF16}),
        (2, "odd", Policy(BF16, FP32), {"micro_batches": 2}),
        (2, "odd", Policy(FP16), {"micro_batches": 2}),
        (2, "odd", Policy(BF16, FP32), {"stage": 2}),
        pytest.param(2, "odd", Policy(None, BF16), {}, marks=pytest.mark.exhaustive),
        (3, "gpt", Policy(BF16), {"recompute": "full"}),
        pytest.param(3, "odd", Policy(None, FP32), {"micro_batches": 2, "own": BF16}, marks=pytest.mark.exhaustive),
        pytest.param(
            2, "odd", Policy(BF16, FP32), {"memory_budget": 2**26, "micro_batches": 2}, marks=pytest.mark.exhaustive
        ),
        pytest.param(
            2, "odd", Policy(BF16, FP32), {"gather_dtype": BF16, "reduce_dtype": BF16}, marks=pytest.mark.exhaustive
        ),
        pytest.param(3, "packed", Policy(BF16, FP32), {"gather_dtype": BF16}, marks=pytest.mark.exhaustive),
        pytest.param(3, "low rank", Policy(BF16, FP32), {}, marks=pytest.mark.exhaustive),
    ],
)
def test_training_equals_that_which_casts(world_size: int, name: str, policy: Policy, options: dict[str, Any]) -> None:
    run_ranks(world_size, _train, name, policy, options)


@pytest.mark.parametrize(
    ("world_size", "policy", "own"),
    [
        pytest.param(1, Policy(None, FP32), BF16, marks=pytest.mark.exhaustive),
        (2, Policy(BF16, FP32), FP32),
        (3, Policy(None, FP32), BF16),
    ],
)
def test_no_sync_adds_in_the_dtype_of_sums(world_size: int, policy: Policy, own: torch.dtype) -> None:
    run_ranks(world_size, _train, "odd", policy, {"micro_batches": 3, "no_sync": True, "own": own})


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        (Policy(BF16, FP32), {"micro_batches": 2, "divisor": 1.0}),
        (Policy(BF16, FP32), {"micro_batches": 3, "divisor": 3.0, "no_sync": True}),
        (Policy(BF16, FP32), {"micro_batches": 3, "divisor": 0.7, "accumulate": 3}),
        pytest.param(
            Policy(BF16, BF16), {"micro_batches": 3, "divisor": 3.0, "no_sync": True}, marks=pytest.mark.exhaustive
        ),
        pytest.param(
            Policy(FP16, FP32), {"micro_batches": 2, "divisor": 1.0, "accumulate": 2}, marks=pytest.mark.exhaustive
        ),
        pytest.param(
            Policy(None, FP32),
            {"micro_batches": 2, "divisor": 1.0, "accumulate": 2, "own": BF16},
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_sums_of_a_policy_are_divided_by_a_factor(policy: Policy, options: dict[str, Any]) -> None:
    run_ranks(2, _train, "odd", policy, options)


@pytest.mark.parametrize("across", ["replicate", "shard"])
def test_nodes_sum_in_the_dtype_of_sums(across: str) -> None:
    options = {"mesh_shape": (2, 2), "across": across, "micro_batches": 2}
    run_ranks(4, _train, "odd", Policy(BF16, FP32), options)


def test_losses_are_those_of_fsdp2() -> None:
    run_ranks(2, workers.train_as_fsdp2)


_NARROW, _WIDE = Policy(BF16, FP32), Policy(FP32, output_dtype=BF16)


@pytest.mark.exhaustive
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(
    ("policies", "options"),
    [
        ({"*": _NARROW, "*norm*": _WIDE}, {"recompute": "full", "stage": 2}),
        ({"*norm*": _WIDE, "*": _NARROW}, {}),  # the last one that matches
        ({"": _NARROW, "blocks.1": _WIDE}, {"memory_budget": 400_000}),
        ({"*": _NARROW, "blocks.[!1].mlp": _WIDE, "blocks.2.mlp.?": _NARROW}, {"recompute": 20_000}),
        ({"*": _NARROW, "*.gate": Policy(torch.float32), "*.experts.*": Policy(torch.bfloat16)}, {}),
        ({"blocks.0.mlp": Policy(torch.float16, torch.float32, output_dtype=torch.float32)}, {"stage": 2}),
    ],
)
def test_policies_by_pattern_give_the_losses_of_fsdp2(
    world_size: int, policies: dict[str, Policy], options: dict[str, Any]
) -> None:
    run_ranks(world_size, policies_workers.train_as_fsdp2, policies, options, timeout=120)


def test_half_the_bytes_travel() -> None:
    assert run_ranks(2, workers.bytes_of_a_step) == [2.0, 2.0]


def test_other_policies_on_other_ranks_are_named() -> None:
    with pytest.raises(RankError, match=f"{RankMismatchError.__name__}(.|\n)*mp_policy"):
        run_ranks(2, workers.other_policies)


@pytest.mark.parametrize(
    ("world_size", "kind", "fused"),
    [(2, "plain", False), (3, "plain", True), pytest.param(2, "sharded", False, marks=pytest.mark.exhaustive)],
)
def test_gradient_scalers_skip_the_same_steps_on_all_ranks(world_size: int, kind: str, fused: bool) -> None:
    scales = run_ranks(world_size, workers.scale_losses, kind, fused)
    assert scales == scales[:1] * world_size
    first = scales[0]
    assert first[0] == 2.0**19  # too large at first
    assert first[4] == 2 * first[5] == 2 * first[6]  # the infinity of one rank
