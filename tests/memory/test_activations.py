"""Planned activations against the allocator's own events."""

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import fxzero
from fxzero.graph.aliasing import memory_of
from fxzero.memory.activations import activation_buffers, activations_of
from fxzero.memory.lifetimes import peak_of
from fxzero.models import GPT, GPT_PRESETS, ROBERTA_PRESETS, RobertaForMaskedLM
from fxzero.passes import default_passes

MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt": lambda: GPT(replace(GPT_PRESETS["tiny"], num_layers=3)),
    "roberta": lambda: RobertaForMaskedLM(replace(ROBERTA_PRESETS["tiny"], num_layers=3, dropout=0.1)),
}


def allocated_peak(step: Callable[[], object]) -> int:
    """Largest sum of bytes allocated and not freed since the begin of `step`, by the profiler's allocation events."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    assert len(events) > 100
    return peak


def test_views_that_do_not_say_so_share_their_memory() -> None:
    class Gates(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(8, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            a, b = torch.unsafe_chunk(self.up(x), 2, dim=1)
            return torch.ops.aten._unsafe_view(torch.tanh(a + 1) * b, (4, 2, 4)).sum()

    step = fxzero.planner.plan(Gates(), torch.zeros(4, 8), world_size=2).step
    (product,) = (node for node in step.graph.nodes if node.target is torch.ops.aten.addmm.default)
    halves = [user for node in product.users for user in node.users if user.target is operator.getitem]
    assert len(halves) == 2
    assert all(memory_of(half) is product for half in halves)
    (flat,) = (node for node in step.graph.nodes if node.target is torch.ops.aten._unsafe_view.default)
    assert memory_of(flat) is flat.args[0]
    assert not {*activation_buffers(step)}.intersection([*halves, flat])


@pytest.mark.parametrize(
    ("name", "recompute", "batch"),
    [
        ("gpt", "none", 8),
        ("gpt", "full", 40),
        pytest.param("roberta", "none", 40, marks=pytest.mark.exhaustive),
        pytest.param("roberta", "full", 8, marks=pytest.mark.exhaustive),
    ],
)
def test_planned_activations_are_what_the_allocator_gives_out(name: str, recompute: Any, batch: int) -> None:
    torch.manual_seed(0)
    ids = torch.randint(2, 100, (batch, 32))
    zero = fxzero.compile(MODELS[name](), passes=default_passes(recompute=recompute))

    def step() -> None:
        loss = zero(input_ids=ids, labels=ids).loss
        loss.backward()

    step()
    step()
    measured = allocated_peak(step)
    step_graph = zero.schedule.step
    activations = activations_of(step_graph)
    assert len(activations.placed) > 10
    planned = peak_of(activations.of_allocator)
    assert planned * 0.98 <= measured <= planned * 1.02
