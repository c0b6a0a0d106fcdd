"""The forward of a model at another length, on tensors without memory: does it run what its record must be there?

Each operator is held against the next event of the record, and answered with a tensor of the geometry that the event
has at this length. The first of equal events is really run, so that its geometry is proved.
"""

import gc
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxzero import torch_internals
from fxzero.capture.draws import generators_of, no_draws_of_python, numbered_draws
from fxzero.capture.fake_tensors import swapped_tensors
from fxzero.capture.joint import ForwardMode, Tracing, call_module, fake_inputs, own_autocast_cache
from fxzero.capture.numbers import Condition
from fxzero.capture.outputs import flatten_output
from fxzero.capture.reads import Reads
from fxzero.capture.slots import Read, Slot
from fxzero.capture.values.branches import Branch, KnownValues
from fxzero.capture.values.checks import noted_checks
from fxzero.capture.written_params import SetData
from fxzero.host.gc_pause import gc_paused
from fxzero.planning.lengths.record import ForwardRecord, KnownTensors, NotRecordedError

logger = logging.getLogger(__name__)

Integers = tuple[int, ...]


class OtherForwardError(Exception):
    """The forward does not do what its record says."""


@dataclass(frozen=True)
class Expected:
    """What the forward must run at one length."""

    record: ForwardRecord
    """Operators, and which tensors they take and give."""
    forms: Sequence[int]
    """A number for each event; events of one number are equal but for their tensors."""
    integers: Sequence[tuple[Integers, Integers]]
    """Integers of the arguments and of the result, by form."""
    outputs: Any
    """The skeleton of the flat outputs, as in the record, with the integers of this length."""


class Rehearsal(Tracing):
    """One forward that is held against its record."""

    conditions: Sequence[Condition] = ()
    """What the forward decided by numbers of the Python state."""

    @property
    def branches(self) -> Sequence[Branch]:
        """Branches of the forward on values that follow from its inputs."""
        return self._values.branches

    def matches(self, expected: Expected) -> bool:
        """True if the forward runs what is expected, reads no state that the record did not read, and leaves none."""
        try:
            self._rehearse(expected)
        except Exception as error:
            logger.debug("not predicted: %s: %s", type(error).__name__, error)
            return False
        return True

    def _rehearse(self, expected: Expected) -> None:
        fake, known = self._fake_mode, expected.record.reads
        with fake:
            state, inputs = self._fake_state(), fake_inputs(self.spec, self.inputs, self.device)
        self._values = KnownValues(inputs, self.inputs)
        self.reads.begin_behind(known)
        actor = _Actor(expected, fake, self.reads, self._values)
        actor.know([*state.params.values(), *state.buffers.values(), *inputs])
        set_data = SetData(state, inputs)
        with (
            gc_paused(),
            torch.inference_mode(False),
            own_autocast_cache(),
            self.before.restored(),
            no_draws_of_python(generators_of(self.module)),
            numbered_draws(),
            torch_internals.eager_checkpoints(),
            torch_internals.checkpoints_without_backward(),
        ):
            seed = torch.default_generator.get_state()
            known_values = torch_internals.known_to_libraries(self._values.is_known)
            with actor, known_values, swapped_tensors(self.module, state):
                numbers = [] if self.stand_ins is None else self.stand_ins.numbers
                args, kwargs = self._arguments(inputs, numbers)
                given = self._put_numbers(numbers)
                with (
                    torch.set_grad_enabled(self.with_backward),
                    self.reads.following(),
                    ForwardMode(set_data, self.observers),
                    noted_checks(_refuse_check),
                ):
                    output = call_module(self.module, self.forward, args, kwargs)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # the trace has warned of what it returns beside tensors
                    tensors, spec = flatten_output(output)
                actor.check_end(tensors, spec)
                if state.rebound:
                    raise OtherForwardError("a buffer is bound anew")
            if not torch.equal(seed, torch.default_generator.get_state()):
                raise OtherForwardError("the generator is seeded")
            self._check_state(known, given)
            if self.stand_ins is not None:
                self.conditions = self.stand_ins.conditions()

    def _check_state(self, known: Reads, given: Mapping[Slot, Any]) -> None:
        new = [read for slot, read in self.reads.found.items() if slot not in known.found]
        if new and (read := _of_old_object(new)) is not None:
            raise OtherForwardError(f"it reads {read.name} of {read.owner!r:.200}")
        if [*self.before.writes(self.reads.set_slots, given, lambda leaf: None)]:
            raise OtherForwardError("it leaves something behind")


def _of_old_object(reads: Sequence[Read]) -> Read | None:
    """A read of an object that was there before the forward; the state of others is nobody's."""
    made_here = set(map(id, gc.get_objects(generation=0)))
    return next((read for read in reads if id(read.owner) not in made_here), None)


def _refuse_check(check: Callable[[Tensor], None], conditions: tuple[Tensor]) -> None:
    raise OtherForwardError("it checks values")


class _Actor(torch_internals.QuickDispatchMode):
    """Answers the operators of a forward."""

    def __init__(self, expected: Expected, fake_mode: Any, reads: Reads, values: KnownValues) -> None:
        super().__init__()
        self._values = values
        self._expected, self._fake_mode, self._reads = expected, fake_mode, reads
        self._known, self._position = KnownTensors(), 0
        self._proved: set[int] = set()
        self._failed: OtherForwardError | None = None

    def know(self, given: Sequence[Tensor]) -> None:
        """Number parameters, buffers and inputs."""
        for tensor in given:
            self._known.add(tensor)

    def check_end(self, output: Sequence[Tensor], spec: Any) -> None:
        """Raise OtherForwardError unless the forward came to its end and returned what it must."""
        if self._failed is not None:  # the model may have caught it
            raise self._failed
        tensors, integers = list[int](), list[int]()
        try:
            skeleton = self._known.flatten(list(output), tensors, integers)
        except NotRecordedError as error:
            raise OtherForwardError(str(error)) from error
        found = skeleton, tuple(tensors), tuple(integers), repr(spec)
        if self._position != len(self._expected.forms) or found != self._expected.outputs:
            raise OtherForwardError("it returns something else")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_seen = self._reads.pause()
        try:
            if device := torch_internals.answer_device(func, args):
                return device
            if (outcome := self._values.decide(func, args)) is not None:
                return outcome
            result = self._answer(func, args, kwargs or {})
            self._values.ran(func, args, kwargs or {}, result)
            return result
        except OtherForwardError as error:
            self._failed = error
            raise
        finally:
            if is_seen:
                self._reads.go_on()

    def _answer(self, operator: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        expected, position, known = self._expected, self._position, self._known
        if (number := known.unchanged_by(operator, args)) is not None:
            with self._fake_mode:
                same = operator(*args, **kwargs)
            known.share(same, number)
            return same
        self._position += 1
        if position >= len(expected.forms):
            raise OtherForwardError(f"it runs {operator} at its end")
        event, form = expected.record.events[position], expected.forms[position]
        integers, result_integers = expected.integers[form]
        tensors, result_tensors = expected.record.tensors[position]
        taken, found = list[int](), list[int]()
        try:
            arguments = known.flatten(args, taken, found), known.flatten(kwargs, taken, found)
        except NotRecordedError as error:
            raise OtherForwardError(str(error)) from error
        if (operator, arguments) != event[:2] or tuple(taken) != tensors or tuple(found) != integers:
            raise OtherForwardError(f"operator {position} is {operator}{found}, not {event.operator}{integers}")
        if form in self._proved:
            return self._made(event.result, iter(result_tensors), iter(result_integers), args, kwargs)
        with self._fake_mode:
            result = operator(*args, **kwargs)
        given, made = list[int](), list[int]()
        if (known.flatten(result, given, made), tuple(given), tuple(made)) != (
            event.result, result_tensors, result_integers
        ):  # fmt: skip
            raise OtherForwardError(f"{operator} has another result than predicted")
        if _is_answerable(event.result):
            self._proved.add(form)
        return result

    def _made(self, skeleton: Any, tensors: Any, integers: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """A result of a geometry, numbered; arguments that are written are returned as they are."""
        if skeleton is None:
            return None
        if skeleton is Tensor:
            wanted = next(tensors)
            leaves = torch_internals.tree_leaves((args, kwargs))
            return next(x for x in leaves if isinstance(x, Tensor) and self._known.number_of(x) == wanted)
        if skeleton[0] is Tensor:
            _, dim, dtype, device = skeleton
            shape = [next(integers) for _ in range(dim)]
            stride = [next(integers) for _ in range(dim)]
            made = torch_internals.fake_of(self._fake_mode, shape, stride, next(integers), dtype, device)
            self._known.add(made)
            return made
        is_list, *parts = skeleton
        made = [self._made(part, tensors, integers, args, kwargs) for part in parts]
        return made if is_list else tuple(made)


def _is_answerable(result: Any) -> bool:
    """True if tensors alone make a result, so that its skeleton and its integers say all of it."""
    if result is None or result is Tensor:
        return True
    if not isinstance(result, tuple):
        return False
    return result[0] is Tensor or (isinstance(result[0], bool) and all(map(_is_answerable, result[1:])))
