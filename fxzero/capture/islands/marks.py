"""The islands of one model: which modules they are, what is known of their calls, and their calls in a trace."""

import contextlib
import enum
import logging
import re
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fxzero import torch_internals
from fxzero.capture.call import flatten_any
from fxzero.capture.draws import Draws
from fxzero.capture.dtensors import is_dtensor
from fxzero.capture.fake_tensors import FakeState
from fxzero.capture.islands.facts import Facts, Modes
from fxzero.capture.islands.find import is_called, matches, parent_of, pattern_of
from fxzero.capture.islands.geometry import geometries
from fxzero.capture.islands.operators import FORWARD, IslandFunction, number, split, write_buffers
from fxzero.capture.islands.probe import Example, NotAnIslandError, learn
from fxzero.capture.islands.site import Site, Slots
from fxzero.capture.numbers import PinnedNumberError
from fxzero.capture.reads import Reads
from fxzero.capture.slots import PLAIN, Read, Slot
from fxzero.capture.values.branches import KnownValues
from fxzero.capture.writes import Before
from fxzero.errors import CaptureError
from fxzero.graph.layout import ParamSpec

logger = logging.getLogger(__name__)


_MOST_RESULTS = 16
"""Results of each call that are remembered, to tell which values they follow."""


class NeedsProbeError(Exception):
    """Leaves a trace that meets a call of which nothing is known yet."""

    def __init__(self, call: "_Call") -> None:
        super().__init__(f"nothing is known yet of a call of {call.site}")
        self.call = call


@dataclass(frozen=True)
class _Call:
    """A call that a trace has met."""

    key: Any
    site: Site
    example: Example


class Islands:
    """The islands of one model.

    Args:
        wanted: patterns of paths; None: those that a trace cannot do without.
    """

    def __init__(self, model: nn.Module, wanted: Sequence[str] | None = ()) -> None:
        self.model = model
        self.finds = wanted is None
        """True if modules that cannot be traced become islands."""
        self._look_at_modules()
        self._wanted = tuple(wanted or ())
        self.without_grad = False
        """True for a trace without a backward."""
        self._found: set[str] = set()
        if self.finds:
            self._found.update(path for path, module in self._modules.items() if path and _is_opaque(module))
        self._refused: dict[str, str] = {}
        """Why modules cannot be islands, by path."""
        self._news: dict[str, str] = {}
        """Why parts became islands of which the user has not been told, by path."""
        self._known: dict[Any, Facts] = {}
        self._similar: dict[Any, Facts] = {}
        self._slots: dict[Any, frozenset[Any]] = {}
        """Slots that calls write, and the ids of containers."""
        self._reads: dict[str, frozenset[Any]] = {}
        """The same that they read, by path."""
        self._guarded: dict[Slot, Read] = {}
        """Plain values that islands read."""
        self._learnt: dict[Any, list[tuple[Any, dict[Slot, Any]]]] = {}
        """Results that calls had, and the plain values that they read then."""
        self._decisive: set[Any] = set()
        """The dicts, by id, and the keys of plain values that results followed when they changed."""
        self._assumed: list[_Call] = []
        if wanted:
            self._check_wanted()

    def _look_at_modules(self) -> None:
        self._modules = dict(self.model.named_modules())
        self.names = {id(module): path for path, module in self._modules.items()}

    def _check_wanted(self) -> None:
        unknown = [each for each in self._wanted if not any(matches(path, [each]) for path in self._modules)]
        if unknown:
            raise ValueError(f"islands= has {unknown[0]!r}, which is the path of no module. '*' stands for one part.")

    @property
    def paths(self) -> list[str]:
        """The paths of the islands, without those inside of others."""
        found = [path for path in self._modules if path in self._found or matches(path, self._wanted)]
        if self.finds and self.without_grad:
            found += [path for path, module in self._modules.items() if _has_fast_path(module)]
        return [path for path in found if not any(_is_inside(path, other) for other in found)]

    def forget_facts(self) -> None:
        """Learn anew what calls give: the state that decides it may have changed."""
        self._look_at_modules()
        self._known, self._similar, self._slots, self._assumed, self._refused = {}, {}, {}, [], {}
        self._guarded = {}

    # -- finding -------------------------------------------------------------------------------------------------

    def add(self, path: str | None, why: Exception) -> bool:
        """Let the module at a path, and those at equal paths but for numbers, be islands from now on.

        Returns:
            False if neither it nor a module around it can be one.
        """
        while path is not None and not self._may_be_one(path):
            path = parent_of(path) if path else None
        if path is None or not self.finds:
            return False
        self._found.update(self._like(path))
        self._news[path] = str(why).splitlines()[0]
        return True

    def _may_be_one(self, path: str) -> bool:
        """False for a module that is one already, that cannot be one, or that has no forward."""
        is_tried = path in self._refused or path in self._found or path in self.paths
        return not is_tried and is_called(self._modules[path])

    def _like(self, path: str) -> list[str]:
        """The paths that are equal to one but for numbers, of modules of the same class."""
        kind, pattern = type(self._modules[path]), pattern_of(path)
        return [each for each, module in self._modules.items() if type(module) is kind and pattern_of(each) == pattern]

    def announce(self) -> None:
        """Tell the user of the islands that were found since the last time."""
        for path, reason in self._news.items():
            if path and path in self.paths:
                name = pattern_of(path) if len(self._like(path)) > 1 else path
                logger.info("island %s: it runs as it is, as one part of the schedule, since %s", name, reason)
            elif path in self.paths:
                warnings.warn(
                    "The whole model runs as one island: all its parameters are gathered at once, and nothing of it is "
                    f"planned, since no smaller part could be traced. {reason}",
                    stacklevel=2,
                )
        self._news = {}

    def learn(self, call: _Call) -> None:
        """Probe a call.

        Raises:
            NotAnIslandError: it cannot be one; its module is none from now on.
        """
        try:
            facts, slots, found = learn(self.model, call.site, call.example)
        except NotAnIslandError as error:
            error.path = call.site.fqn
            self._refused.update(dict.fromkeys(self._like(error.path), str(error)))
            self._found.difference_update(self._refused)
            raise
        self._known[call.key] = facts
        self._similar[call.key[1:]] = facts
        self._slots[call.key] = slots
        reads = {(id(each.owner), each.name) for each in found} | {id(each.value) for each in found}
        self._reads[call.site.fqn] = self._reads.get(call.site.fqn, frozenset()) | reads
        plain = {(id(each.owner), each.name): each for each in found if _is_plain(each)}
        self._note_plain(call, facts, {slot: each for slot, each in plain.items() if slot not in slots})

    def _note_plain(self, call: _Call, facts: Facts, values: Mapping[Slot, Read]) -> None:
        """Note plain values that a call has read, and does not set, and which of them its results follow."""
        self._guarded |= values
        results: Any = facts.output, facts.outs
        now = {slot: each.value for slot, each in values.items()}
        earlier = self._learnt.setdefault(call.key, [])
        for then, were in earlier:
            changed = [slot for slot in now if slot in were and were[slot] != now[slot]]
            if then != results and len(changed) == 1:
                self._decisive.add((id(values[changed[0]].place), values[changed[0]].name))
        earlier[:] = [*earlier[1 - _MOST_RESULTS :], (results, now)]

    def guarded(self) -> list[Read]:
        """What islands read that is plain, and that none of them sets: their results may follow it."""
        written = {slot for slots in self._slots.values() for slot in slots}
        return [each for slot, each in self._guarded.items() if slot not in written]

    @property
    def guarded_slots(self) -> set[Slot]:
        """The dicts, by id, and the keys of what `guarded` gives."""
        return {(id(each.place), each.name) for each in self.guarded()}

    def check_numbers(self, slots: Sequence[Slot]) -> None:
        """Refuse that numbers are inputs of a step which results of islands follow.

        Args:
            slots: of the numbers.

        Raises:
            PinnedNumberError: some are.
        """
        if not self._decisive.isdisjoint(slots):
            raise PinnedNumberError("results of an island follow a number")

    def read_by(self, site: Site) -> frozenset[Any]:
        """Slots, and ids of containers, that an island is known to read."""
        return self._reads.get(site.fqn, frozenset())

    def are_settled(self) -> bool:
        """Probe the calls of a trace that were taken to be like others; False if one is not.

        Raises:
            NotAnIslandError: one cannot be an island.
        """
        is_right = True
        for call in self._assumed:
            assumed = call.site.facts
            self.learn(call)
            call.site.facts = assumed
            is_right = is_right and self._known[call.key] == assumed
        return is_right

    def why_not(self) -> str:
        """Why the first module that was to be an island cannot be one, for an error."""
        path, why = next(iter(self._refused.items()), ("", ""))
        return f"{path or 'The model'} cannot run as it is, as an island of the step: {why}." if why else ""

    def check_reads(self, reads: Sequence[Read]) -> None:
        """Refuse that code outside of an island reads what the island sets.

        Raises:
            CaptureError: some does.
        """
        written = {slot for slots in self._slots.values() for slot in slots}
        for read in reads:
            if (id(read.owner), read.name) in written or id(read.value) in written:
                path = self.names.get(id(read.owner), "")
                raise CaptureError(f"forward reads {path}.{read.name}, which an island sets", path)

    def missing_attribute(self, error: Exception) -> CaptureError | None:
        """An error of its own for an attribute that is missing because an island sets it; None for another error."""
        found = re.search(r"has no attribute '(\w+)'", str(error)) if isinstance(error, AttributeError) else None
        if found is None:
            return None
        for (call, *_), slots in self._slots.items():
            if any(isinstance(slot, tuple) and slot[1] == found.group(1) for slot in slots):
                return CaptureError(f"forward reads {found.group(1)}, which an island sets", call[0])
        return None

    # -- in a trace ----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def marked(self) -> Generator["Marks"]:
        """Let the forwards of islands be nodes of the trace in the block."""
        self._assumed = []
        marks = Marks(self, {path: self._modules[path] for path in self.paths})
        inner = {path: module for path, module in marks.modules.items() if path}
        before = [(vars(each), "forward" in vars(each), vars(each).get("forward")) for each in inner.values()]
        for path, module in inner.items():
            vars(module)["forward"] = marks.forward_of(path, module)
        try:
            yield marks
        finally:
            for attributes, had_own, own in before:
                if had_own:
                    attributes["forward"] = own
                else:
                    attributes.pop("forward", None)

    def facts_of(self, call: _Call) -> Facts:
        """What is known of a call.

        Raises:
            NeedsProbeError: nothing, nor of one like it.
        """
        facts = self._known.get(call.key)
        if facts is None:
            facts = self._similar.get(call.key[1:])
            if facts is None:
                raise NeedsProbeError(call)
            self._assumed.append(call)
        return facts


@dataclass
class Marks:
    """The calls of islands in one trace."""

    islands: Islands
    modules: Mapping[str, nn.Module]
    """The islands by path."""
    sites: list[Site] = field(default_factory=list[Site])
    values: KnownValues | None = None
    """Knows which arguments of islands follow from inputs and constants."""
    _numbers: Counter[str] = field(default_factory=Counter[str])
    _handles: dict[int, tuple[Site, Tensor]] = field(default_factory=dict[int, tuple[Site, Tensor]])
    """The sites and handles of calls by the keys of their draws."""
    _fragile: list[Tensor] = field(default_factory=list[Tensor])
    """Tensors that eager has in one memory, and a step has not."""

    def begin(
        self,
        state: FakeState,
        specs: Mapping[str, ParamSpec],
        inputs: Sequence[tuple[Tensor, Tensor]],
        draws: Draws,
        device: torch.device,
        reads: Reads,
        before: Before,
        forward: Callable[..., Any],
    ) -> None:
        """Give the parts of a trace that has begun.

        Args:
            inputs: stand-ins for the arguments of the model, each with its argument.
            forward: the model's own.
        """
        self._params = {id(stand_in): specs[name] for name, stand_in in state.params.items()}
        self._ignored = {id(stand_in): name for name, stand_in in state.ignored.items()}
        self._real_buffers = {id(stand_in): name for name, stand_in in state.buffers.items()}
        self._buffers = dict(self.islands.model.named_buffers())
        self._real = {id(stand_in): real for stand_in, real in inputs if not real.is_meta}
        self._draws, self._device, self._reads = draws, device, reads
        self._forward, self._before = forward, before

    @property
    def replaced(self) -> frozenset[int]:
        """Ids of the modules that are islands."""
        return frozenset(map(id, self.modules.values()))

    def forward_of_model(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """What to call as the forward of the model: its own, unless all of it is an island."""
        return self.forward_of("", self.modules[""]) if "" in self.modules else forward

    def forward_of(self, path: str, module: nn.Module) -> Callable[..., Any]:
        """What stands in the place of a module's forward."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            is_seen = self._reads.pause()
            try:
                return self._call(path, module, args, kwargs)
            finally:
                if is_seen:
                    self._reads.go_on()

        return forward

    def check_write(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse to write in place what shares memory in eager alone.

        Raises:
            CaptureError: the operator would.
        """
        if not self._fragile or not torch_internals.is_mutable(op):
            return
        arguments = torch_internals.named_arguments(op, args, kwargs)
        for name in torch_internals.written_names(op):
            if any(torch_internals.same_storage(arguments[name], each) for each in self._fragile):
                raise CaptureError(
                    "The forward writes in place into a tensor that an island returned, or was given, and that shares "
                    "memory with another one: in a compiled step it does not. Write into a clone."
                )

    def _call(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        key = self._draws.number_call()
        site, tensors, params, buffers = self._site(path, module, args, kwargs)
        if any(each.parallel for each in site.params) or any(map(is_dtensor, tensors)):
            raise CaptureError(f"{path or 'the model'} has DTensors, of parameters or arguments", path)
        earlier = self._handles.get(key)
        if earlier is None:
            self._numbers[path] += 1
        else:
            earlier[0].draws_again = True
        site.facts = self.islands.facts_of(self._known_call(path, site, tensors, params, buffers))
        facts = site.facts
        self._check_state(path, site)
        self._check_written(path, facts, [*tensors, *params, *buffers])
        if site.has_backward:
            site.grads = site.declared_grads([*tensors, *params])
        index = number(site)
        self.sites.append(site)
        again, made = (None if earlier is None else earlier[1]), []
        if site.has_backward:
            outs = list(IslandFunction.apply(site, index, again, made, *tensors, *params, *buffers))  # type: ignore[arg-type]
        else:
            handle, *outs = FORWARD(index, again, *split(site, [*tensors, *params, *buffers]))
            made = [handle]
            write_buffers(site, buffers, outs)
        self._handles.setdefault(key, (site, made[0]))
        for each in reversed(facts.written_inputs):
            tensors[each].copy_(outs.pop())
        for out, shared in facts.shares_memory.items():
            self._fragile += [outs[out], [*tensors, *params, *buffers][shared]]
        self._fragile += [outs[out] for out in facts.siblings]
        return facts.output.rebuild(outs)

    def _check_state(self, path: str, site: Site) -> None:
        """Refuse that an island reads what forward has set before: a step sets it after its forward.

        Raises:
            CaptureError: it does.
        """
        changed = self._before.changed_now() | self._reads.set_slots
        own = {(id(module), "training") for module in site.module.modules()}
        if not changed.isdisjoint(self.islands.read_by(site) | own):
            raise CaptureError(f"forward sets what {site} reads", path)

    @staticmethod
    def _check_written(path: str, facts: Facts, tensors: list[Tensor]) -> None:
        """Refuse to write into an input that is given twice.

        Raises:
            CaptureError: the island does.
        """
        for index in facts.written_inputs:
            others = tensors[:index] + tensors[index + 1 :]
            if any(torch_internals.same_storage(tensors[index], each) for each in others):
                raise CaptureError("a tensor that it writes into is given twice", path)

    def _known_call(
        self, path: str, site: Site, tensors: Sequence[Tensor], params: Sequence[Tensor], buffers: Sequence[Tensor]
    ) -> _Call:
        modes = site.modes, site.requires_grad, tuple(map(repr, site.leaves)), site.module.training
        real = {index: self._real[id(each)] for index, each in enumerate(tensors) if id(each) in self._real}
        fixed: dict[int, int] = {}
        for index, each in enumerate(tensors):
            if index not in real and self.values is not None and (found := self.values.value_of(each)) is not None:
                real[index], is_constant = found
                if is_constant:
                    fixed[index] = _digest(found[0])
        key = (
            (path, self._numbers[path]), pattern_of(path), type(site.module), geometries(tensors), geometries(params),
            modes, repr(site.structure), tuple(fixed.items()),
        )  # fmt: skip
        of_buffers = [
            self._buffers[self._real_buffers[id(each)]] if id(each) in self._real_buffers else each for each in buffers
        ]
        known = tuple(
            torch.empty_like(each, device="meta") if torch_internals.is_fake(each) else each for each in of_buffers
        )
        return _Call(key, site, Example(geometries(tensors), real, known, frozenset(fixed)))

    def _site(
        self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Site, list[Tensor], list[Tensor], list[Tensor]]:
        """A site for a call, and its inputs, parameters and buffers."""
        leaves, structure = flatten_any(args, kwargs)
        at = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        tensors = [leaves[index] for index in at]
        for leaf in leaves:
            if torch_internals.is_symbolic(leaf):
                raise PinnedNumberError(f"a number is an argument of island {path}")
            if not isinstance(leaf, (Tensor, *_FIXED)):
                raise CaptureError(f"island {path} is given a {type(leaf).__qualname__}, which is no plain value", path)
        if ignored := [self._ignored[id(each)] for each in module.parameters() if id(each) in self._ignored]:
            raise CaptureError(
                f"{path or 'The model'} runs as it is, since it cannot be traced, and {ignored[0]} in it is one of "
                "ignored_params, which is an input of traced code alone. Take it out of ignored_params, or keep it in "
                "a module that can be traced.",
                path,
            )
        params, param_slots = _held(module, 0, lambda each: id(each) in self._params)
        buffers, buffer_slots = _held(module, 1, lambda each: True)
        device_type = self._device.type
        modes = Modes(
            torch.is_grad_enabled(),
            torch.is_autocast_enabled(device_type),
            torch.get_autocast_dtype(device_type),
            torch.is_autocast_cache_enabled(),
        )
        site = Site(
            path,
            module,
            None if path else self._forward,
            structure,
            [None if isinstance(leaf, Tensor) else leaf for leaf in leaves],
            at,
            [self._params[id(each)] for each in params],
            [each.requires_grad for each in (*tensors, *params)],
            (param_slots, buffer_slots),
            modes,
            self._device,
        )
        return site, tensors, params, buffers


def _digest(tensor: Tensor) -> int:
    with torch_internals.without_dispatch():
        return hash(tensor.cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())


def _is_plain(read: Read) -> bool:
    """True for a value that never changes itself, and that has a place."""
    return isinstance(read.value, (*PLAIN, enum.Enum)) and read.place is not None


_FIXED = (*PLAIN, nn.Module, type(lambda: 0), type(len), type)
"""Types of arguments that an island may get as they are."""


def _held(module: nn.Module, which: int, is_known: Callable[[Tensor], bool]) -> tuple[list[Tensor], Slots]:
    """The parameters (0) or buffers (1) of a module and of those in it, and where they are held."""
    index: dict[int, int] = {}
    tensors: list[Tensor] = []
    slots: list[tuple[dict[str, Any], str, int]] = []
    for part in module.modules():
        table = torch_internals.tensor_tables(part)[which]
        for key, value in table.items():
            if value is not None and is_known(value):
                if id(value) not in index:
                    index[id(value)] = len(tensors)
                    tensors.append(value)
                slots.append((table, key, index[id(value)]))
    return tensors, tuple(slots)


def _is_opaque(module: nn.Module) -> bool:
    """True for what no trace can look into: a scripted module, and what torch.compile returns."""
    return isinstance(module, torch.jit.ScriptModule) or torch_internals.is_compiled(module)


def _has_fast_path(module: nn.Module) -> bool:
    """True for a module that, in evaluation without gradients, runs kernels of its own, unless a trace looks on."""
    return not module.training and isinstance(module, _WITH_FAST_PATH)


_WITH_FAST_PATH = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)


def _is_inside(path: str, other: str) -> bool:
    return path != other and (not other or path.startswith(f"{other}."))
