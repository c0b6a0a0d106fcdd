"""torch.profiler shows the lines of the schedule; numbers stay what they are, and other steps run without ranges."""

import contextlib

import torch
from torch.profiler import ProfilerActivity, profile

import fxzero
from fxzero.models import MLP, MLPConfig

LINES = {
    "fxzero forward",
    "all_gather layers.0.linear.weight +5",
    "compute layers.0",
    "compute layers.1",
    "compute layers.2",
    "fxzero backward",
    "reduce_scatter layers.0.linear.weight +5",
}


def _train(profiled_steps: set[int]) -> tuple[list[torch.Tensor], list[set[str]]]:
    """Parameters after some steps, and the names of all events of each step that was profiled."""
    torch.manual_seed(0)
    model = MLP(MLPConfig(dropout=0.1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    zero = fxzero.compile(model, optimizer=optimizer)
    found: list[set[str]] = []
    for step in range(4):
        x = torch.randn(4, 16)
        with contextlib.ExitStack() as stack:
            profiled = step in profiled_steps
            profiler = stack.enter_context(profile(activities=[ProfilerActivity.CPU])) if profiled else None
            with zero.no_sync():
                zero(x).square().mean().backward()
            zero(x).sum().backward()  # its gradient has stride 0
            if step == 2:
                zero.schedule.text(measured=True)
        optimizer.step()
        optimizer.zero_grad()
        if profiler is not None:
            found.append({event.name for event in profiler.events() or ()})
    assert "compute" in zero.schedule.text(measured=True)
    return [parameter.detach().clone() for parameter in zero.parameters()], found


def test_a_profiler_finds_layers_and_collectives_and_changes_no_number() -> None:
    plain, _ = _train(set())
    profiled, (first, second) = _train({1, 3})
    assert first >= LINES
    assert second >= LINES
    assert all(map(torch.equal, plain, profiled))
