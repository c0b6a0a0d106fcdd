"""Plans of calls that differ in one length alone, and the plan of a length that was not traced.

    family = Family.of(three traced calls)        None where their graphs differ in more than integers
    values = family.values_for(call)              None for a call of another kind
    family.expected(values)                       what the forward must run there; see `rehearsal.py`
    family.plan_at(values, ...)                   its plan

The length is one size of the inputs, wherever it occurs among them: the tokens of a batch, or its rows. A prediction
holds if every size is 2 or more (formulas of gradients branch at 0 and 1), if all integers of the forward are what the
rehearsal finds, and if every polynomial of the graph is a line through three points or occurs in the forward.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxzero import torch_internals
from fxzero.capture.call import CallSpec, TensorLeaf
from fxzero.comm.backend import Backend
from fxzero.graph.nodes import Role, is_island, is_observer
from fxzero.graph.recipe import Recipe
from fxzero.graph.step import StepGraph
from fxzero.graph.variant import Variant
from fxzero.host.gc_pause import gc_paused
from fxzero.memory.activations import (
    PLACED_FROM_BYTES,
    Activations,
    PlacedTemporary,
    activation_buffers,
    activations_of,
    placeable,
)
from fxzero.memory.arena_plan import ArenaPlan, Placed, plan_arenas
from fxzero.planning.codegen import Code
from fxzero.planning.lengths.frame import Frame, Geometry, any_number, scan, with_values
from fxzero.planning.lengths.polynomials import Number, Polynomials, Values, value_of
from fxzero.planning.lengths.record import ForwardRecord
from fxzero.planning.lengths.rehearsal import Expected
from fxzero.planning.plan import Plan, VariantPlan, code_of
from fxzero.planning.stream_events import StreamEvents, plan_stream_events

LEAST = 2
"""The smallest size that is predicted."""


@dataclass(frozen=True)
class TracedCall:
    """A call that was traced and planned."""

    spec: CallSpec
    plan: Plan
    record: ForwardRecord


class _NoFamilyError(Exception):
    """Three calls do not differ in one length alone."""


@dataclass(frozen=True)
class _Geometries:
    """The arguments of a call, apart from their integers."""

    skeleton: Any
    integers: list[int]
    sizes: list[int]
    """Which of the integers are sizes."""

    @classmethod
    def of(cls, spec: CallSpec) -> "_Geometries":
        skeleton: list[Any] = [spec.structure]
        integers: list[int] = []
        sizes: list[int] = []
        for leaf in spec.leaves:
            if not isinstance(leaf, TensorLeaf):
                skeleton.append(leaf)
                continue
            skeleton.append((len(leaf.shape), leaf.dtype, leaf.device, leaf.requires_grad))
            sizes += range(len(integers), len(integers) + len(leaf.shape))
            integers += [*leaf.shape, *leaf.stride]
        return cls(tuple(skeleton), integers, sizes)


def kind_of(spec: CallSpec) -> Any:
    """What the specs of calls have in common that may differ in lengths alone; it is hashable."""
    return _Geometries.of(spec).skeleton


class Family:
    """What the plans of one family share."""

    def __init__(self, calls: Sequence[TracedCall]) -> None:
        geometries = [_Geometries.of(each.spec) for each in calls]
        _check(all(each.skeleton == geometries[0].skeleton for each in geometries), "arguments of other kinds")
        rows = [each.integers for each in geometries]
        varying = [i for i in geometries[0].sizes if len({row[i] for row in rows}) > 1]
        _check(bool(varying), "equal sizes")
        self._place = varying[0]
        lengths = [row[self._place] for row in rows]
        _check(len({*lengths}) == len(lengths) == 3 and min(lengths) >= LEAST, "no three lengths")
        order = sorted(range(3), key=lengths.__getitem__)
        calls, rows = [calls[i] for i in order], [rows[i] for i in order]
        lengths.sort()
        for i in varying:  # one length, up to a shift of one token
            shifts = {row[i] - length for row, length in zip(rows, lengths, strict=True)}
            _check(len(shifts) == 1 and abs(shifts.pop()) <= 1, "several lengths")
        self.last = last = calls[-1]
        self.lengths: Values = (lengths[0], lengths[1], lengths[2])
        self._polynomials = Polynomials(self.lengths)
        self._arguments = self._polynomials.numbers(rows)
        self._sizes = {each.index for i in varying if type(each := self._arguments[i]) is Number}
        self._skeleton = geometries[0].skeleton
        _check_alike([each.plan for each in calls])
        self._take_records([each.record for each in calls])
        in_forward = len(self._polynomials.all)
        frames: dict[int, Frame] = {}
        planned: dict[int, dict[bool, VariantPlan]] = {}
        for variant, each in last.plan.variants.items():
            number = id(each.step)
            planned.setdefault(number, {}).setdefault(
                variant.accumulate and bool(each.step.nodes(Role.REDUCE_SCATTER)), each
            )
            if number not in frames:
                frames[number] = self._frame([call.plan.variants[variant].step for call in calls])
        unproved = [each for each in self._polynomials.all[in_forward:] if not each.is_linear]
        _check(not unproved, "backward has squares that forward does not have")
        self._forms_of_step = {number: Form(frame, planned[number]) for number, frame in frames.items()}
        """The graphs by the ids of their steps in the last plan."""

    @classmethod
    def of(cls, calls: Sequence[TracedCall]) -> "Family | str":
        """The family of three calls; where they make none, why."""
        try:
            with gc_paused():
                return cls(calls)
        except _NoFamilyError as error:
            return str(error)

    def _take_records(self, records: Sequence[ForwardRecord]) -> None:
        first, *others = records
        _check(all(each.events == first.events for each in others), "other operators")
        _check(all(each.tensors == first.tensors for each in others), "other values")
        forms: dict[Any, int] = {}
        self._forms: list[int] = []
        self._of_forms: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        rows = zip(*(each.integers for each in records), strict=True)
        for event, integers in zip(first.events, rows, strict=True):
            arguments, result = zip(*integers, strict=True)
            key = event, arguments, result
            if key not in forms:
                forms[key] = len(forms)
                numbers = self._polynomials.numbers
                self._of_forms.append((tuple(numbers(arguments)), tuple(numbers(result))))
            self._forms.append(forms[key])
        (skeleton, tensors, _, spec), *_ = outputs = [each.outputs for each in records]
        _check(all((a, b, d) == (skeleton, tensors, spec) for a, b, _, d in outputs), "other outputs")
        self._outputs = skeleton, tensors, self._polynomials.numbers([each[2] for each in outputs]), spec

    def _frame(self, steps: Sequence[StepGraph]) -> Frame:
        scans = [scan(step) for step in steps]
        _check(all(each.skeleton == scans[0].skeleton for each in scans), "other graphs")
        _check(all(_are_equal(each.constants, steps[0].constants) for each in steps), "other constants")
        facts = [_facts(step) for step in steps]
        _check(all(each == facts[0] for each in facts), "other steps")
        return Frame(steps[-1], self._polynomials.numbers([each.integers for each in scans]))

    # -- another length --------------------------------------------------------------------------------------------

    def values_for(self, spec: CallSpec) -> list[int] | None:
        """The value of each polynomial for a call; None if the call is none of the family, or some value is no size."""
        found = _Geometries.of(spec)
        if found.skeleton != self._skeleton:
            return None
        length = found.integers[self._place]
        values = self._polynomials.at(length) if length >= LEAST else None
        if values is None or [value_of(each, values) for each in self._arguments] != found.integers:
            return None
        sizes = self._sizes.union(*(form.frame.sizes for form in self._forms_of_step.values()))
        return values if all(values[index] >= LEAST for index in sizes) else None

    def expected(self, values: Sequence[int]) -> Expected:
        """What the forward must run where the polynomials have these values."""

        def at(numbers: Sequence[int]) -> tuple[int, ...]:
            return tuple([value_of(each, values) for each in numbers])

        skeleton, tensors, integers, spec = self._outputs
        of_forms = [(at(arguments), at(result)) for arguments, result in self._of_forms]
        return Expected(self.last.record, self._forms, of_forms, (skeleton, tensors, at(integers), spec))

    def plan_at(self, values: Sequence[int], backend: Backend, enough_bytes: int) -> Plan:
        """The plan where the polynomials have these values.

        Args:
            enough_bytes: size of an arena that is there in any case.
        """
        made: dict[int, dict[bool, VariantPlan]] = {}
        for number, form in self._forms_of_step.items():  # first the one that reduces gradients
            made[number] = of_form = form.at(values, backend, enough_bytes)
            enough_bytes = max(enough_bytes, *(each.arena.nbytes for each in of_form.values()))
        plan, bindings = self.last.plan, dict[Variant, VariantPlan]()
        for variant, planned in plan.variants.items():
            of_form = made[id(planned.step)]
            bindings[variant] = of_form.get(variant.accumulate, of_form[False])
        frames = {id(form.frame.step): form.frame for form in self._forms_of_step.values()}
        return dataclasses.replace(plan, variants=ExactVariants(bindings, frames), bindings=bindings)

    def tangents(self, values: Sequence[int]) -> list[tuple[int, ...]]:
        """The strides of the gradients of outputs."""
        frame = next(iter(self._forms_of_step.values())).frame
        return [with_values(frame.values[node][1], values) for node in frame.step.nodes(Role.TANGENT)]


class Form:
    """One graph of the family's plans, which is the frame of its length."""

    def __init__(self, frame: Frame, planned: Mapping[bool, VariantPlan]) -> None:
        """
        Args:
            planned: the variants of the last length by whether they add to gradients.
        """
        self.frame, self._accumulates = frame, [*planned]
        self._has_events = any(each.events is not None for each in planned.values())
        step = frame.step
        buffers = activation_buffers(step)
        self._placeable = {
            node: PlacedTemporary(buffers[node], variant)
            for node, variant in placeable(step, buffers).items()
            if any_number(frame.values[node]) or buffers[node].nbytes >= PLACED_FROM_BYTES
        }
        self._kinds: dict[Any, tuple[Geometry, list[fx.Node]]] = {}
        """The nodes that can have places, by their geometry."""
        for node in self._placeable:
            geometry: Geometry = frame.values[node]
            self._kinds.setdefault(geometry.key, (geometry, []))[1].append(node)
        self._codes: dict[bool, Code] = {}
        for accumulate, each in planned.items():
            self._code(each.arena.placed, each.events, accumulate=accumulate).compiled()

    def at(self, values: Sequence[int], backend: Backend, enough_bytes: int) -> dict[bool, VariantPlan]:
        """The variants of a length: its offsets are new, its code is the one of all lengths."""
        placed: dict[fx.Node, PlacedTemporary] = {}
        shapes: dict[fx.Node, tuple[int, ...]] = {}
        for geometry, nodes in self._kinds.values():
            shape, stride, _, dtype, *_ = with_values(tuple(geometry), values)
            nbytes = math.prod(shape) * dtype.itemsize
            if nbytes < PLACED_FROM_BYTES or stride != torch_internals.strides_of(shape):
                continue
            for node in nodes:
                each = self._placeable[node]
                placed[node] = dataclasses.replace(each, buffer=dataclasses.replace(each.buffer, nbytes=nbytes))
                shapes[node] = shape
        placed = {node: placed[node] for node in self._placeable if node in placed}
        activations, step = Activations({}, placed), self.frame.step
        made: dict[bool, VariantPlan] = {}
        for accumulate, arena in plan_arenas(step, backend, activations, enough_bytes).items():
            events = plan_stream_events(step, arena.placed, accumulate=accumulate) if self._has_events else None
            code = self._code(arena.placed, events, accumulate=accumulate)
            made[accumulate] = VariantPlan(step, activations, arena, events, code, tuple(values), shapes)
        return made

    def _code(self, placed: Placed, events: StreamEvents | None, *, accumulate: bool) -> Code:
        key = accumulate and events is not None
        if key not in self._codes:
            nothing = Activations({}, {})
            code = code_of(self.frame.step, nothing, placed, events, undecided=tuple(self._placeable))
            self._codes[key] = code
        return self._codes[key]


class ExactVariants(Mapping[Variant, VariantPlan]):
    """The variants of a length as an ordinary plan has them, each made when somebody asks for it."""

    def __init__(self, bindings: Mapping[Variant, VariantPlan], frames: Mapping[int, Frame]) -> None:
        """
        Args:
            frames: by the ids of their steps.
        """
        self._bindings, self._frames = bindings, frames
        self._steps: dict[int, tuple[StepGraph, dict[fx.Node, fx.Node]]] = {}
        self._made: dict[int, VariantPlan] = {}

    def __getitem__(self, variant: Variant) -> VariantPlan:
        binding = self._bindings[variant]
        if id(binding) not in self._made:
            self._made[id(binding)] = self._exact(binding, accumulate=variant.accumulate)
        return self._made[id(binding)]

    def __iter__(self) -> Iterator[Variant]:
        return iter(self._bindings)

    def __len__(self) -> int:
        return len(self._bindings)

    def _exact(self, binding: VariantPlan, *, accumulate: bool) -> VariantPlan:
        number = id(binding.step)
        if number not in self._steps:
            self._steps[number] = self._frames[number].at(binding.numbers)
        step, nodes = self._steps[number]
        activations = activations_of(step)
        memory = binding.arena.memory
        placed = {(kind, nodes[node]): entry for (kind, node), entry in binding.arena.placed.items()}
        events = None if binding.events is None else plan_stream_events(step, placed, accumulate=accumulate)
        code = code_of(step, activations, placed, events)
        return VariantPlan(step, activations, ArenaPlan(memory, placed), events, code)


def _check(holds: bool, why: str) -> None:
    if not holds:
        raise _NoFamilyError(why)


def _check_alike(plans: Sequence[Plan]) -> None:
    """Refuse plans that differ in more than sizes, or of which parts are no function of sizes alone."""
    first, *others = plans
    for each in others:
        _check(beside_buckets(each.recipe) == beside_buckets(first.recipe), "other recipes")
        _check([*each.variants] == [*first.variants], "other variants")
        _check(each.captured.differentiated == first.captured.differentiated, "other outputs with gradients")
        _check(each.captured.differentiable == first.captured.differentiable, "other differentiable outputs")
        _check(repr(each.captured.output) == repr(first.captured.output), "other plain outputs")
    for each in plans:
        state = each.captured.state
        _check(not state.writes and not state.observers and not state.tensors, "Python state beside guards")
        _check(state.numbers.is_like(first.captured.state.numbers), "other numbers of the Python state")
        _check(each.recipe.recompute == "none" and not each.recipe.without, "options that look at sizes")
        _check(not each.captured.step.written, "forward writes parameters")
        _check(not any(is_island(node) or is_observer(node) for node in each.step.graph.nodes), "islands or hooks")


def beside_buckets(recipe: Recipe) -> Recipe:
    """A recipe without the buckets of the layout: a model's first plan is made before they are fixed."""
    return dataclasses.replace(recipe, buckets=None)


def _facts(step: StepGraph) -> tuple[Any, ...]:
    return (
        step.params, step.sharding, step.written, step.synchronize, step.kept, step.resident, step.layout, step.without,
    )  # fmt: skip


def _are_equal(some: Mapping[str, torch.Tensor], others: Mapping[str, torch.Tensor]) -> bool:
    """True for equal constants, bit for bit."""

    def same(one: torch.Tensor, other: torch.Tensor) -> bool:
        if one is other:
            return True
        if (one.shape, one.dtype, one.device) != (other.shape, other.dtype, other.device):
            return False
        return one.device.type == "cpu" and one.numpy().tobytes() == other.numpy().tobytes()

    return some.keys() == others.keys() and all(same(some[name], others[name]) for name in some)
