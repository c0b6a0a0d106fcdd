"""The operators that a forward runs, each with its arguments: tensors by number, integers apart from all else.

                              skeleton                          tensors    integers
    view(add_2, [2, 24, 64])      view (tensor, [int, int, int])    17         2, 24, 64
    its result                    tensor (float32, cpu, 3)          none       2, 24, 64, 1536, 64, 1, 0

Two forwards with equal skeletons and tensors run the same operators on the same values, whatever their integers are.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fxzero import torch_internals
from fxzero.capture.reads import Reads
from fxzero.capture.repeats.arguments import Arguments, UnknownArgumentError

_PLAIN = (str, torch.dtype, torch.device, torch.layout, torch.memory_format, bytes, complex)
_SMALL_NUMEL = 4096
"""Elements up to which a tensor that is there before the call counts by its values."""


class NotRecordedError(Exception):
    """An operator has an argument that no record can hold."""


class KnownTensors:
    """The tensors of one forward, numbered as they come; none is kept alive."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._num = 0

    def add(self, tensor: Tensor) -> int:
        """Number a tensor."""
        self._num += 1
        self._known[id(tensor)] = weakref.ref(tensor), self._num
        return self._num

    def share(self, tensor: Tensor, number: int) -> None:
        """Give a tensor the number of another one."""
        self._known[id(tensor)] = weakref.ref(tensor), number

    def unchanged_by(self, operator: Any, args: tuple[Any, ...]) -> int | None:
        """The number of the argument if the operator is a `detach` that changes nothing: of one that requires no grad.

        torch runs one on the result of a factory such as `arange` if something else holds that, a record for example.
        """
        is_plain = operator is torch.ops.aten.detach.default and not args[0].requires_grad
        return self.number_of(args[0]) if is_plain else None

    def number_of(self, tensor: Tensor) -> int | None:
        """The number of a tensor; None for a new one."""
        entry = self._known.get(id(tensor))
        return entry[1] if entry is not None and entry[0]() is tensor else None

    def flatten(self, value: Any, tensors: list[int], integers: list[int]) -> Any:
        """The skeleton of an argument or a result.

        Args:
            tensors: receives the numbers of its tensors.
            integers: receives its integers, and those of the geometry of new tensors.
        """
        kind = type(value)
        if kind is int:
            integers.append(value)
            return int
        if value is None or kind is bool:
            return value
        if isinstance(value, Tensor):
            return self._flatten_tensor(value, tensors, integers)
        if kind is list or kind is tuple or kind is torch.Size:
            return (kind is list, *[self.flatten(each, tensors, integers) for each in value])
        if kind is float:
            return float, value.hex()
        if (name := torch_internals.name_of_symbol(value)) is not None:
            return kind, name
        if isinstance(value, _PLAIN):
            return value
        if kind is dict:
            return dict, *[(key, self.flatten(each, tensors, integers)) for key, each in value.items()]
        raise NotRecordedError(f"{kind.__qualname__} among the arguments of an operator")

    def _flatten_tensor(self, tensor: Tensor, tensors: list[int], integers: list[int]) -> Any:
        number = self.number_of(tensor)
        if number is not None:
            tensors.append(number)
            return Tensor
        if torch_internals.is_fake(tensor):
            self.add(tensor)
            return geometry(tensor, integers)
        if tensor.numel() > _SMALL_NUMEL or tensor.device.type != "cpu":
            raise NotRecordedError("a large tensor that is none of the model's")
        return tensor.dtype, tuple(tensor.shape), repr(torch_internals.values_of(tensor))


def geometry(tensor: Tensor, integers: list[int]) -> Any:
    """The skeleton of a tensor's geometry, whose integers follow."""
    integers += torch_internals.geometry_of(tensor)
    return Tensor, tensor.dim(), tensor.dtype, tensor.device


class Event(NamedTuple):
    """One operator that ran."""

    operator: Any
    arguments: Any
    """The skeleton of its arguments."""
    result: Any
    """The skeleton of its result."""


@dataclass(frozen=True)
class ForwardRecord:
    """What one forward ran."""

    events: list[Event]
    tensors: list[tuple[tuple[int, ...], tuple[int, ...]]]
    """Numbers of the tensors among the arguments, and in the result, of each event."""
    integers: list[tuple[tuple[int, ...], tuple[int, ...]]]
    """Integers of the arguments, and of the result, of each event."""
    outputs: Any
    """The skeleton of the flat outputs, with the numbers and the integers of their tensors."""
    reads: Reads
    """Knows the Python state that it read."""


@dataclass
class Recording:
    """Records a forward while it is traced."""

    record: ForwardRecord | None = None
    """The record of the last forward that was traced to its end."""
    _running: ForwardRecord | None = None
    _known: KnownTensors = field(default_factory=KnownTensors)
    _shared: dict[Any, Any] = field(default_factory=dict[Any, Any])
    _skeletons: dict[Any, tuple[Any, tuple[int, ...]]] = field(default_factory=dict[Any, Any])
    """Skeletons and integers of arguments that are known tensors and plain values."""

    def begin(self, given: Sequence[Tensor], reads: Reads) -> None:
        """A forward begins.

        Args:
            given: parameters, buffers and inputs.
            reads: learns what it reads.
        """
        self.record, self._running = None, ForwardRecord([], [], [], None, reads)
        self._known = KnownTensors()
        for tensor in given:
            self._known.add(tensor)

    def ran(self, operator: Any, arguments: Arguments, result: Any) -> None:
        """An operator has run."""
        running = self._running
        if running is None:
            return
        if (number := self._known.unchanged_by(operator, arguments.args)) is not None:
            return self._known.share(result, number)
        made, of_made = list[int](), list[int]()
        try:
            skeleton, taken, of_taken = self._taken(arguments)
            event = Event(operator, skeleton, self._known.flatten(result, made, of_made))
        except NotRecordedError:
            self._running = None
            return
        running.events.append(self._shared.setdefault(event, event))
        running.tensors.append((taken, tuple(made)))
        running.integers.append((of_taken, tuple(of_made)))

    def _taken(self, arguments: Arguments) -> tuple[Any, tuple[int, ...], tuple[int, ...]]:
        """The skeleton of arguments, the numbers of their tensors, and their integers."""
        known = self._known
        try:
            structure, numbers = arguments.structure, tuple(map(known.number_of, arguments.tensors))
        except UnknownArgumentError:
            structure, numbers = None, (None,)
        is_plain = None not in numbers
        if is_plain and structure in self._skeletons:
            skeleton, integers = self._skeletons[structure]
            return skeleton, cast("tuple[int, ...]", numbers), integers
        taken, of_taken = list[int](), list[int]()
        skeleton = tuple(known.flatten(each, taken, of_taken) for each in (arguments.args, arguments.kwargs))
        integers = tuple(of_taken)
        if is_plain:
            self._skeletons[structure] = skeleton, integers
        return skeleton, tuple(taken), integers

    def end(self, output: Sequence[Tensor], spec: Any) -> None:
        """The forward is over.

        Args:
            output: its flat tensors.
            spec: its plain values.
        """
        running, self._running = self._running, None
        if running is not None:
            tensors, integers = list[int](), list[int]()
            try:
                skeleton = self._known.flatten(list(output), tensors, integers)
            except NotRecordedError:  # it returns a large tensor of the Python state
                return
            outputs = skeleton, tuple(tensors), tuple(integers), repr(spec)
            self.record = ForwardRecord(running.events, running.tensors, running.integers, outputs, running.reads)
