"""A plan as data: saved, read, compared."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from fxzero.comm.nccl import NCCL
from fxzero.errors import FxzeroError, PlanError
from fxzero.graph.devices import Devices
from fxzero.graph.recipe import Recipe
from fxzero.graph.variant import SYNCHRONIZING
from fxzero.passes import default_passes
from fxzero.planner import SavedPlan, diff, plan
from fxzero.planning.plan import make_plan
from fxzero.planning.schedule import Schedule
from tests.helpers.captured import trace


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))


def saved(world_size: int = 2, **recipe: object) -> SavedPlan:
    example = torch.randn(4, 16)
    passes = default_passes(**recipe) if recipe else None  # type: ignore[arg-type]
    return plan(net(), example, world_size=world_size, passes=passes).saved()


def test_a_plan_is_saved_and_read_back(tmp_path: Path) -> None:
    before = saved()
    before.write(tmp_path / "plan.json")
    after = SavedPlan.read(tmp_path / "plan.json")
    assert after == before
    assert after.digest == before.digest == json.loads((tmp_path / "plan.json").read_text())["digest"]
    assert diff(before, after) == ""


def test_it_has_every_variant_with_schedule_code_and_offsets() -> None:
    variants = saved().variants
    assert list(variants) == ["overwriting gradients", "adding to gradients", "under no_sync()"]
    for facts in variants.values():
        assert facts["schedule"].startswith("world_size=2")
        assert "def backward" in facts["code"]
        assert all(0 <= offset <= facts["arena_bytes"] - nbytes for _, _, nbytes, _, _, offset in facts["buffers"])
    overwriting, adding, _ = variants.values()
    assert len(adding["buffers"]) > len(overwriting["buffers"]), "what is added comes from a scratch buffer"


def test_equal_models_have_equal_digests() -> None:
    assert saved().digest == saved().digest
    assert saved().digest != saved(world_size=3).digest


def test_diff_names_what_was_decided_otherwise() -> None:
    text = diff(saved(), saved(bucket_bytes=1))
    assert "recipe.bucket_bytes: " in text
    assert "+all_gather" in text
    assert "sharding" not in text
    assert "sharding.inside: {'size': 2, 'placement': 'shard'} -> {'size': 3, 'placement': 'shard'}" in diff(
        saved(), saved(world_size=3)
    )


def test_a_plan_without_gradients_lacks_variants_of_one_with_them() -> None:
    with torch.no_grad():
        forward = saved()
    assert list(forward.variants) == ["forward only"]
    assert "forward only: only in the plan after" in diff(saved(), forward)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(format="fxzero plan 0"), "format 'fxzero plan 0'"),
        (lambda data: data["recipe"].update(bucket_bytes=7), "was changed since it was saved"),
        (lambda data: data.pop("variants"), "no saved plan"),
    ],
)
def test_what_is_no_plan_is_refused_with_its_file(tmp_path: Path, change, message: str) -> None:
    path = tmp_path / "plan.json"
    saved().write(path)
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(PlanError, match=message) as raised:
        SavedPlan.read(path)
    assert str(path) in str(raised.value)


def test_the_code_of_a_schedule_is_that_of_two_streams_on_a_gpu() -> None:
    """It records events; those of the variant that runs first, which it shows with its offsets."""
    captured = trace(net(), torch.randn(4, 16))
    made = make_plan(captured, Recipe(), NCCL, Devices.all(torch.device("cuda")))
    schedule = Schedule(made)
    first = made.variants[SYNCHRONIZING[0]]
    assert schedule.code == first.code.source
    assert "record_" in schedule.code
    events = SavedPlan.of(made).variants[SYNCHRONIZING[0].label]["events"]
    assert first.events is not None
    assert len(events) == len(first.events.edges) > 0


def test_a_schedule_that_nothing_runs_cannot_be_measured() -> None:
    schedule = plan(net(), torch.randn(4, 16), world_size=2)
    with pytest.raises(FxzeroError, match="Nothing runs this schedule"):
        schedule.text(measured=True)
