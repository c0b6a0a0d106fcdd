"""Names of modules, parameters and buffers are any text without a dot; none of it becomes code or another line."""

import ast

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, example, given, settings
from torch import Tensor, nn

import fxzero
from fxzero.graph.names import printable
from fxzero.planner import SavedPlan

names = st.text(st.characters(exclude_characters="."), min_size=1)


class Named(nn.Module):
    """A model with a parameter and a buffer of these names, in a child of a third name."""

    def __init__(self, child: str, parameter: str, buffer: str) -> None:
        super().__init__()
        self.names = child, parameter, buffer
        holder = nn.Module()
        holder.register_parameter(parameter, nn.Parameter(torch.arange(16.0).view(4, 4)))
        holder.register_buffer(buffer, torch.ones(4))
        self.add_module(child, nn.ModuleList([holder, nn.Linear(4, 4)]))

    def forward(self, x: Tensor) -> Tensor:
        child, parameter, buffer = self.names
        holder, linear = getattr(self, child)
        return (linear(torch.tanh(x @ getattr(holder, parameter))) * getattr(holder, buffer)).sum()


def schedule_after_a_step(*called: str) -> tuple[fxzero.Schedule, Tensor]:
    torch.manual_seed(0)
    model = Named(*called)
    zero = fxzero.compile(model)
    zero(torch.ones(2, 4)).backward()
    grad = next(model.parameters()).grad
    assert grad is not None
    return zero.schedule, grad


PLAIN, PLAIN_GRAD = schedule_after_a_step("child", "parameter", "buffer")


@settings(max_examples=25, deadline=None)
@given(names, names, names)
@example("x\n    getattr(__import__('os'), 'abort')()#", "w\rraise SystemExit", "b\r\n\x0c\nimport os")
@example("\x00", "\ud800", "\u2028\u202e")
@example("lambda", "'''", '"""')
@example("forward", "mark", "aten_mm_default")
@example("a\\", "# -*- coding: utf-7 -*-", "{x}")
@example("(", "%s", " ")
@pytest.mark.exhaustive
def test_names_change_nothing_but_comments(child: str, parameter: str, buffer: str) -> None:
    attributes = dir(nn.ModuleList())
    assume(parameter != buffer and not {child, parameter, buffer} & {*attributes, "names"})
    schedule, grad = schedule_after_a_step(child, parameter, buffer)
    assert ast.dump(ast.parse(schedule.code)) == ast.dump(ast.parse(PLAIN.code))
    assert torch.equal(grad, PLAIN_GRAD)
    assert len(str(schedule).splitlines()) == len(str(PLAIN).splitlines())
    saved = schedule.saved()
    assert SavedPlan.from_json(saved.to_json()) == saved


@given(names, names)
@example("a\nb", "a\\nb")
def test_printed_names_are_one_line_each_of_its_own(one: str, other: str) -> None:
    assert printable(one).isprintable()
    assert (printable(one) == printable(other)) == (one == other)


@pytest.mark.parametrize("name", ["layers.0.weight", "Größe", "任务", "a b"])
def test_ordinary_names_are_printed_as_they_are(name: str) -> None:
    assert printable(name) == name
