"""`zero.schedule.memory`: a table and a picture of what a rank's memory is for."""

from pathlib import Path

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn

import fxzero
from fxzero.errors import FxzeroError
from fxzero.graph.layout import LayoutName
from fxzero.host.memory_in_use import MemoryInUse
from fxzero.models import GPT, GPT_PRESETS
from fxzero.planning.schedule import Schedule
from fxzero.testing import engine_of

IDS = torch.zeros(2, 16, dtype=torch.int64)
BATCH = {"input_ids": IDS, "labels": IDS}


def planned(layout: LayoutName = "contiguous") -> Schedule:
    with torch.device("meta"):
        model = GPT(GPT_PRESETS["tiny"])
    return fxzero.planner.plan(model, BATCH, world_size=2, layout=layout)


def test_report_of_a_plan_says_what_each_part_takes() -> None:
    assert_expected_inline(
        str(planned().memory),
        """\
memory of a rank                    bytes
--------------------------------  -------
parameters (shards)                61 KiB
gradients (shards)                 61 KiB
optimizer state (shards)          122 KiB
buffers                               0 B
arena                             244 KiB
  this plan                       244 KiB
  this plan, lower bound          244 KiB
  overwriting gradients           244 KiB
  adding to gradients             244 KiB
  under no_sync()                 122 KiB
  gathered buckets, at most       122 KiB
  gradient buckets, at most       122 KiB
  temporary activations, at most      0 B
saved activations at the peak     221 KiB
other activations at the peak      32 KiB
planned peak                      741 KiB
lower bound                       721 KiB
measured                                -""",
    )


def test_parts_add_up() -> None:
    report = planned().memory
    rows = dict(report.rows())
    held = ("parameters (shards)", "gradients (shards)", "optimizer state (shards)", "buffers", "arena")
    activations = report.saved_bytes_at_peak + report.other_bytes_at_peak
    assert report.planned_peak_bytes == sum(rows[name] or 0 for name in held) + activations
    assert report.lower_bound_bytes <= report.planned_peak_bytes
    assert rows["measured"] is None
    assert rows["optimizer state (shards)"] == 2 * (rows["gradients (shards)"] or 0)


def test_staging_of_the_interleaved_layout_has_a_row() -> None:
    rows = dict(planned("interleaved").memory.rows())
    assert rows["  staging, at most"]
    assert "  staging, at most" not in dict(planned().memory.rows())


def test_report_after_steps_has_the_optimizer_state_that_is_there() -> None:
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    zero = fxzero.compile(model, optimizer=optimizer, example=torch.zeros(4, 64))
    before = zero.schedule.memory
    assert before.footprint.held.optimizer_state == before.footprint.held.gradients
    for _ in range(2):
        zero(torch.randn(4, 64)).sum().backward()
        optimizer.step()
    after = zero.schedule.memory
    state = sum(each["momentum_buffer"].nbytes for each in optimizer.state.values())
    assert state <= after.footprint.held.optimizer_state <= state * 1.02 + 1024
    assert after.footprint.arena_bytes == engine_of(zero).sharded.arena.nbytes


def test_picture_is_drawn(tmp_path: Path) -> None:
    schedule = planned()
    schedule.plot_memory(tmp_path / "memory.png")
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")
    assert len((tmp_path / "memory.png").read_bytes()) > 10_000


def test_before_anything_is_traced_it_says_how_to_trace() -> None:
    with pytest.raises(FxzeroError, match="call the module once, or pass example="):
        _ = Schedule().memory


def test_measured_bytes_are_over_what_was_before() -> None:
    gauge = MemoryInUse(torch.device("cpu"))
    block = torch.ones(64 * 2**20, dtype=torch.uint8)
    measured = gauge.read()
    assert measured is None or 0 < measured < 16 * block.nbytes
