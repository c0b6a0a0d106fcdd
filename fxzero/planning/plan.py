"""All that is decided about one kind of call, before anything is bound to memory.

captured step --passes--> final graph --proof--> offsets --> stream events --> code        for each variant:

    overwriting gradients | adding to gradients      one graph, which reduces gradients
    under no_sync()                                  one more graph, which keeps them unsharded

A plan serves every call of its kind, whatever its backward meets. Binding it (`runtime/`) decides nothing.
"""

import contextlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import fx

from fxzero.capture import Captured
from fxzero.comm.backend import Backend
from fxzero.graph.devices import Devices
from fxzero.graph.nodes import Role, role
from fxzero.graph.recipe import Recipe
from fxzero.graph.schedule_text import rows
from fxzero.graph.step import Pass, StepGraph
from fxzero.graph.variant import HOLDING, ONLY_FORWARD, SYNCHRONIZING, Variant
from fxzero.graph.verify import verify_complete, verify_plan
from fxzero.graph.wire import WireFormat
from fxzero.host.gc_pause import gc_paused
from fxzero.memory.activations import Activations, activations_of
from fxzero.memory.arena_plan import ArenaPlan, Placed, plan_arenas
from fxzero.memory.footprint import Footprint, Held, footprint
from fxzero.memory.report import MemoryReport
from fxzero.passes import DefaultPasses, NarrowReduceScatters, default_passes, inserting_passes
from fxzero.planning.codegen import Code, generate
from fxzero.planning.run_passes import Observer, run_passes
from fxzero.planning.stream_events import StreamEvents, plan_stream_events


@dataclass(frozen=True)
class VariantPlan:
    """One way in which a step of a plan runs."""

    step: StepGraph
    """The final graph."""
    activations: Activations
    arena: ArenaPlan
    """Where everything lies in the arena."""
    events: StreamEvents | None
    """What orders the two streams of a GPU; None where one thread does all."""
    code: Code
    numbers: tuple[int, ...] = ()
    """The value of each Number in the graph and in the code: those of a length that was not traced."""
    shapes: Mapping[fx.Node, tuple[int, ...]] = field(default_factory=dict[fx.Node, "tuple[int, ...]"])
    """The shape of each undecided node of the code that has a place."""

    def timed_code(self) -> Code:
        """The same code with a call of `mark` after each line of the schedule."""
        return code_of(
            self.step,
            self.activations,
            self.arena.placed,
            self.events,
            [row.nodes[-1] for row in rows(self.step)],
            undecided=self.code.undecided,
        )


@dataclass(frozen=True)
class Plan:
    """What is decided about one kind of call."""

    captured: Captured
    recipe: Recipe
    devices: Devices
    variants: Mapping[Variant, VariantPlan]
    """All that a call of this kind can meet; they share what is equal."""
    bindings: Mapping[Variant, VariantPlan] | None = None
    """What is bound in the place of the variants, for a length that was not traced."""

    @property
    def step(self) -> StepGraph:
        """The final graph of a step that reduces its gradients."""
        return self.form(synchronize=True).step

    def form(self, *, synchronize: bool) -> VariantPlan:
        """The first variant outside of no_sync(), or inside; forward is the same in all of them.

        A step that has no gradients has one form, which serves both.
        """
        for variant, planned in self.variants.items():
            if variant.synchronizes == synchronize:
                return planned
        return next(iter(self.variants.values()))

    @property
    def arena_bytes(self) -> int:
        """Bytes of the arena that all variants need."""
        return max(variant.arena.nbytes for variant in (self.bindings or self.variants).values())

    @property
    def is_predicted(self) -> bool:
        """True for the plan of a length that was not traced."""
        return self.bindings is not None

    def footprint(self, held: Held, arena_bytes: int = 0, *, synchronize: bool = True) -> Footprint:
        """The memory that the plan needs of a rank: that of the variant of one graph that needs the most.

        Args:
            held: what a rank holds from step to step.
            arena_bytes: of the arena that is there, which other plans use too.
        """
        step = self.form(synchronize=synchronize).step
        most = max((each for each in self.variants.values() if each.step is step), key=lambda each: each.arena.nbytes)
        return footprint(step, most.arena.memory, most.activations, held, max(self.arena_bytes, arena_bytes))

    def report(
        self, held: Held, arena_bytes: int = 0, measured_bytes: int | None = None, *, synchronize: bool = True
    ) -> MemoryReport:
        """The memory that the plan needs, to print; see `footprint`.

        Args:
            measured_bytes: the most that was in use.
        """
        variants = {variant.label: planned.arena.nbytes for variant, planned in self.variants.items()}
        needed = self.footprint(held, arena_bytes, synchronize=synchronize)
        step = self.form(synchronize=synchronize).step
        return MemoryReport(needed, step, variants if len(variants) > 1 else {}, measured_bytes)


def make_plan(
    captured: Captured,
    recipe: Recipe,
    backend: Backend,
    devices: Devices,
    passes: Sequence[Pass] | None = None,
    observe: Callable[[Sequence[Pass]], Sequence[Observer]] | None = None,
) -> Plan:
    """Run the passes over a captured step, for each variant, and prove, place and write what comes of them.

    Args:
        captured: stays as it is.
        recipe: what was chosen.
        backend: what moves bytes, for the memory that it needs.
        passes: run these instead of what the recipe stands for; of it only the layout and what is left out count.
        observe: gives the observers of a list of passes.

    Raises:
        ScheduleError: a pass left the schedule unsafe, or all of them left it incomplete.
    """
    chosen = default_passes(recipe) if passes is None else passes
    observers = () if observe is None else observe(chosen)
    with gc_paused():
        step = captured.step.under(recipe)
        run_passes(step, chosen, observers=observers)
        verify_complete(step)
        if not step.grads and not step.nodes(Role.REDUCE_SCATTER):
            return Plan(captured, recipe, devices, {ONLY_FORWARD: _variants(step, backend, devices)[False]})
        reducing = _variants(step, backend, devices)
        variants = {variant: reducing[variant.accumulate] for variant in SYNCHRONIZING}
        enough_bytes = max(variant.arena.nbytes for variant in reducing.values())
        holding = _variants(_holding(captured, recipe, chosen, observers), backend, devices, enough_bytes)[False]
    return Plan(captured, recipe, devices, variants | dict.fromkeys(HOLDING, holding))


def _holding(captured: Captured, recipe: Recipe, passes: Sequence[Pass], observers: Sequence[Observer]) -> StepGraph:
    """The final graph of a step under no_sync(): made by the same passes, and proved at their end.

    They were proved one by one where gradients are reduced; here only if somebody looks on, or something is wrong.
    """
    step = captured.step.under(recipe, synchronize=False)
    if not observers:
        with contextlib.suppress(Exception):
            for each in passes:
                each(step)
            verify_plan(step)
            return step
    step = captured.step.under(recipe, synchronize=False)
    run_passes(step, passes, observers=observers, dump=False)
    verify_complete(step)
    return step


def recipe_of(passes: Sequence[Pass] | None, memory_budget: object = None) -> tuple[Recipe, tuple[Pass, ...] | None]:
    """The recipe that a list of passes stands for, and the list itself if none of ours made it.

    Raises:
        ValueError: there is a memory budget for a list that stands for no recipe.
    """
    if isinstance(passes, DefaultPasses):
        return passes.recipe, None
    if passes is not None and memory_budget is not None:
        raise ValueError("memory_budget chooses for a list that default_passes() made; passes= has another.")
    return Recipe(), None if passes is None else tuple(passes)


def reduced_as(recipe: Recipe, passes: Sequence[Pass] | None) -> WireFormat | None:
    """The wire format of gradients, in buckets that it makes smaller.

    Args:
        passes: those that run instead of what the recipe stands for.
    """
    listed = default_passes(recipe) if passes is None else passes
    return next((each.format for each in listed if isinstance(each, NarrowReduceScatters)), None)


def with_collectives(captured: StepGraph, recipe: Recipe) -> StepGraph:
    """A trial: a captured step with one collective for each parameter and use, before they are bucketed."""
    step = captured.under(recipe)
    for each in inserting_passes(recipe):
        each(step)
    return step


def _variants(step: StepGraph, backend: Backend, devices: Devices, enough_bytes: int = 0) -> dict[bool, VariantPlan]:
    """The variants of a final graph: for a backward that overwrites gradients, and for one that adds to them."""
    activations = activations_of(step)
    planned: dict[bool, VariantPlan] = {}
    code: Code | None = None
    for accumulate, arena in plan_arenas(step, backend, activations, enough_bytes).items():
        events = None
        if devices.compute.type == "cuda" and step.sharding.shard_ranks > 1:
            events = plan_stream_events(step, arena.placed, accumulate=accumulate)
        if code is None or events is not None or not step.is_persistent:
            code = code_of(step, activations, arena.placed, events)
        planned[accumulate] = VariantPlan(step, activations, arena, events, code)
    return planned


def code_of(
    step: StepGraph,
    activations: Activations,
    placed: Placed,
    events: StreamEvents | None,
    marked: Collection[fx.Node] = (),
    saved: tuple[fx.Node, ...] | None = None,
    undecided: Collection[fx.Node] = (),
) -> Code:
    """The source of a variant, with a call after each node that events or buffers of a moment ask for.

    Args:
        marked, saved, undecided: as of `generate`.
    """
    recorded = {*(events.recorded if events is not None else ()), *_ends_without_statement(step, placed)}
    at_begin = events is not None and events.at_begin
    return generate(
        step,
        {} if undecided else activations.placed,
        recorded,
        record_begin=at_begin,
        marked=marked,
        saved=saved,
        undecided=undecided,
    )


def _ends_without_statement(step: StepGraph, placed: Placed) -> Iterable[fx.Node]:
    """Where buffers that are allocated at each use begin and end, at nodes that are no statements of their own."""
    if step.is_persistent:
        return
    nodes = list(step.graph.nodes)
    for buffer, _ in placed.values():
        if role(nodes[buffer.start]) is Role.GRAD_SLOT:
            yield nodes[buffer.start]
        if role(nodes[buffer.end]) is Role.RELEASE:
            yield nodes[buffer.end]
