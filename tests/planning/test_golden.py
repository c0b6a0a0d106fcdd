"""The schedules of whole models at several world sizes, as text in golden/; `FXZERO_ACCEPT=1` rewrites the files.

One process, no process group, no memory: the models are on the meta device.
"""

import difflib
import functools
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import fxzero
from fxzero.errors import PlanError
from fxzero.graph.layout import LayoutName
from fxzero.graph.names import format_bytes
from fxzero.graph.nodes import Role
from fxzero.models import (
    GPT,
    GPT_PRESETS,
    LLAMA_PRESETS,
    MLP,
    MLP_PRESETS,
    ROBERTA_PRESETS,
    Llama,
    RobertaForMaskedLM,
)
from fxzero.passes import NarrowAllGathers, NarrowReduceScatters, Pass, default_passes
from fxzero.planner import plan

GOLDEN = Path(__file__).parents[1] / "golden"
KIB = 1024


class Regression(nn.Module):
    """An MLP and its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = MLP(MLP_PRESETS["tiny"])

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(self.mlp(x), target)


def points() -> dict[str, Tensor]:
    return {"x": torch.empty(4, 16), "target": torch.empty(4, 8)}


def tokens() -> dict[str, Tensor]:
    ids = torch.zeros(2, 16, dtype=torch.int64)
    return {"input_ids": ids, "labels": ids}


def small_buckets(bucket_bytes: int) -> tuple[Pass, ...]:
    return default_passes(bucket_bytes=bucket_bytes, prefetch_bytes=2 * bucket_bytes, reduce_bytes=2 * bucket_bytes)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]], int]] = {
    "mlp": (Regression, points, 4 * KIB),
    "gpt": (lambda: GPT(GPT_PRESETS["tiny"]), tokens, 32 * KIB),
    "llama": (lambda: Llama(LLAMA_PRESETS["tiny"]), tokens, 32 * KIB),
    "roberta": (lambda: RobertaForMaskedLM(ROBERTA_PRESETS["tiny"]), tokens, 32 * KIB),
}


@functools.cache
def schedule_of(
    name: str,
    world_size: int,
    layout: LayoutName = "contiguous",
    narrow: tuple[Pass, ...] = (),
    with_backward: bool = True,
) -> fxzero.Schedule:
    build, batch, bucket_bytes = CASES[name]
    with torch.device("meta"):
        model, example = build(), batch()
    passes = (*small_buckets(bucket_bytes), *narrow)
    with torch.set_grad_enabled(with_backward):
        return plan(model, example, world_size=world_size, passes=passes, layout=layout)


@pytest.mark.parametrize("name", CASES)
def test_schedule_is_the_accepted_one(name: str) -> None:
    sections = [schedule_of(name, world_size).text(memory=True) for world_size in (1, 2, 8)]
    sections.append(schedule_of(name, 8, with_backward=False).text(memory=True))
    _compare(name, sections)


def test_schedule_in_narrow_types_is_the_accepted_one() -> None:
    types = [NarrowAllGathers(torch.bfloat16), NarrowAllGathers(torch.int8)]
    schedules = [schedule_of("mlp", 8, narrow=(each, NarrowReduceScatters())) for each in types]
    _compare("mlp_narrow", [schedule.text(memory=True) for schedule in schedules])


def _compare(name: str, sections: list[str]) -> None:
    """Compare with what is in the golden file, or accept it."""
    actual = "\n\n".join(sections) + "\n"
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("FXZERO_ACCEPT"):
        path.write_text(actual)
    expected = path.read_text() if path.exists() else ""
    changes = difflib.unified_diff(expected.splitlines(), actual.splitlines(), str(path.name), "now", lineterm="")
    assert actual == expected, "review, then accept with FXZERO_ACCEPT=1:\n" + "\n".join(changes)


def test_compiled_schedule_is_the_planned_one_when_the_process_group_is_fake() -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    build, batch, bucket_bytes = CASES["gpt"]
    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=8)
    try:
        zero = fxzero.compile(build(), example=batch(), passes=small_buckets(bucket_bytes))
        assert str(zero.schedule) == str(schedule_of("gpt", 8))
        with pytest.raises(PlanError, match="rank 3 of 8 of a process group that is not there"):
            zero(**batch())
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("name", CASES)
def test_interleaved_schedule_has_the_same_collectives_and_says_what_it_copies(name: str) -> None:
    contiguous, interleaved = schedule_of(name, 8), schedule_of(name, 8, "interleaved")
    starts = [
        [line.split()[:2] for line in str(schedule).splitlines() if line.startswith(("all_gather", "reduce_scatter"))]
        for schedule in (interleaved, contiguous)
    ]
    assert sorted(starts[0]) == sorted(starts[1])
    copied = interleaved.totals.interleaved_copy_bytes
    assert str(interleaved).splitlines()[0].endswith(f"  interleaved: {format_bytes(copied)} copied")
    step = interleaved.step
    collectives = [step.bucket_of(start) for start in step.nodes(Role.ALL_GATHER, Role.REDUCE_SCATTER)]
    assert copied == sum(bucket.gathered.nbytes for bucket in collectives)
    assert contiguous.totals.interleaved_copy_bytes == 0
    assert str(schedule_of(name, 1, "interleaved")) == str(schedule_of(name, 1))


@pytest.mark.parametrize("name", CASES)
def test_header_says_which_gradients_are_copied(name: str) -> None:
    schedule = schedule_of(name, 2)
    copied = schedule.totals.copied_grad_bytes
    assert (f"  gradients: {format_bytes(copied)} copied" in schedule.text()) == (copied > 0)
    assert (copied > 0) == (name in ("gpt", "roberta"))  # whose layer norms do it


def test_another_layout_is_refused() -> None:
    with pytest.raises(ValueError, match="layout is 'strided'"):
        plan(nn.Linear(2, 2), torch.ones(1, 2), world_size=2, layout="strided")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="layout is 'strided'"):
        fxzero.compile(nn.Linear(2, 2), layout="strided")  # type: ignore[arg-type]


def test_planning_only_reads_the_model() -> None:
    torch.manual_seed(0)
    model = GPT(GPT_PRESETS["tiny"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    draws = torch.get_rng_state()
    planned = plan(model, tokens(), world_size=3)
    assert planned.totals.num_all_gathers > 0
    assert torch.equal(torch.get_rng_state(), draws)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(param.grad is None and type(param) is nn.Parameter for param in model.parameters())
    assert model(**tokens()).loss.requires_grad
