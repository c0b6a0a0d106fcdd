"""The operators of one forward in order, by the blocks of the model that ran them.

A segment is what one call of a block ran, or what ran between two blocks. A tensor is written as the place where it
was made: the index of a segment, the index of the operator in it, and the index of the result. So two equal blocks
have equal operators, and read values from places that lie equally far back.
"""

import contextlib
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fxzero import torch_internals
from fxzero.capture.fake_tensors import FakeState
from fxzero.capture.provenance import around_forwards, autograd_nodes
from fxzero.capture.repeats.arguments import Arguments, UnknownArgumentError, plain
from fxzero.torch_internals import is_fake

Place: TypeAlias = tuple[Any, ...]
"""Segment, operator and result that made a tensor; or `(OWN, kind, name, geometry)` of a parameter or buffer of the
block that reads it, `(GIVEN, kind, name)` of another one or of an argument, `(CONSTANT, ...)` of a small tensor made of
numbers."""
OWN, GIVEN, CONSTANT, UNKNOWN = "own", "given", "constant", "unknown"
_LARGEST_CONSTANT = 1024
"""Elements of a constant that is compared by its values."""


class NotRepeatedError(Exception):
    """Says why repeated blocks are not traced once; the model is traced as a whole then."""


@dataclass
class Segment:
    """What ran in one call of a block, or between two blocks."""

    path: str | None
    """The path of the block; None between blocks."""
    operators: list[Any] = field(default_factory=list[Any])
    """Operators and their arguments, without the tensors, and the geometry of their results."""
    reads: list[Place] = field(default_factory=list[Place])
    """The tensors among the arguments, in order."""
    shares_grad: bool = False
    """True if it reads a tensor that requires grad from a segment other than the one before, or from an argument."""


class Record:
    """The operators of one forward.

    Args:
        blocks: the blocks of the model by the ids of their modules.
    """

    def __init__(self, blocks: Mapping[int, str]) -> None:
        self.segments: list[Segment] = []
        self.outputs: list[Place] = []
        """What the forward returned."""
        self.autograd: dict[str, tuple[str, ...]] = {}
        """The names of autograd nodes by the block that ran, or that ran last, with a star."""
        self.last_output: Any = None
        """What the last block returned."""
        self.why_not: str | None = None
        """Why nothing can be said of this forward."""
        self.runs_python = False
        """True if its backward runs code of an autograd.Function."""
        self._blocks = blocks
        self._places: dict[int, Place] = {}
        self._own: dict[int, tuple[str, str, Any]] = {}
        self._alive: list[Any] = []
        self._segment: Segment | None = None
        self._block: str | None = None
        self._entered: dict[str, None] = {}
        self._changes: list[tuple[int, str]] = [(0, "*")]
        self._is_on = False

    def begin(self, state: FakeState, inputs: Sequence[Tensor]) -> None:
        """Give the tensors that stand for parameters, buffers and arguments."""
        params = dict(zip(state.params, state.inputs, strict=True))
        for kind, tensors in (("param", params), ("buffer", state.buffers)):
            for name, tensor in tensors.items():
                self._own[id(tensor)] = kind, name, (*_geometry(tensor), tensor.requires_grad)
        for index, tensor in enumerate(inputs):
            self._places[id(tensor)] = GIVEN, "input", index
        self._alive += [state, inputs]

    @contextlib.contextmanager
    def following(self, unseen: Callable[[Any], Any] = lambda function: function) -> Generator[None]:
        """Record the operators and the blocks that run in the block.

        Args:
            unseen: makes functions invisible to who watches what the forward runs.
        """
        self._is_on = True
        try:
            with around_forwards(unseen(self._enter), unseen(self._leave)):
                yield
        finally:
            self._is_on = False

    def add(self, op: Any, arguments: Arguments, result: Any) -> None:
        """Record an operator that ran."""
        if not self._is_on or self.why_not is not None:
            return
        if torch_internals.saves_through_hooks():
            self.why_not = "a checkpoint, or hooks of saved tensors"
            return
        if self._segment is None:
            self._segment = Segment(self._block)
            self.segments.append(self._segment)
        segment, index = self._segment, len(self.segments) - 1
        position = len(segment.operators)
        try:
            written = arguments.structure, *[self._note_read(tensor, segment) for tensor in arguments.tensors]
            results = list(result) if isinstance(result, (list, tuple)) else [result]
            made = tuple(_geometry(each) if isinstance(each, Tensor) else plain(each, []) for each in results)
        except UnknownArgumentError as error:
            self.why_not = str(error)
            return
        for number, each in enumerate(results):
            if isinstance(each, Tensor) and id(each) not in self._own:
                self._places.setdefault(id(each), (index, position, number))
        self._alive.append(result)
        segment.operators.append((op, written, made, torch.is_grad_enabled()))

    def end(self, tensors: Sequence[Tensor], differentiated: Sequence[int]) -> None:
        """Give what the forward returned."""
        self.outputs = [self._place_of(tensor, None) for tensor in tensors]
        found = autograd_nodes([tensors[index] for index in differentiated])
        self.runs_python = any(isinstance(node, torch.autograd.function.FunctionCtx) for node in found)
        by_number = sorted((torch_internals.sequence_number(node), str(node.name())) for node in found)
        names: dict[str, list[str]] = {}
        changes, at = [*self._changes, (2**63, "")], 0
        for number, name in by_number:
            while changes[at + 1][0] <= number:
                at += 1
            names.setdefault(changes[at][1], []).append(name)
        self.autograd = {path: tuple(each) for path, each in names.items()}
        self._alive, self._places = [], {}

    def _enter(self, module: nn.Module, args: Any) -> None:
        path = self._blocks.get(id(module))
        if path is None or not self._is_on:
            return
        if self._block is not None or path in self._entered:
            self.why_not = f"{path} runs twice, or inside of another block"
        self._entered[path] = None
        self._block, self._segment = path, None
        self._changes.append((torch_internals.next_sequence_number(), path))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        path = self._blocks.get(id(module))
        if path is None or not self._is_on:
            return
        self._block, self._segment = None, None
        self.last_output = output
        self._changes.append((torch_internals.next_sequence_number(), f"{path}*"))

    def _note_read(self, tensor: Tensor, segment: Segment) -> bool:
        """Note the place of a tensor that a segment reads; True if it requires grad."""
        place, needs_grad = self._place_of(tensor, segment.path), tensor.requires_grad
        segment.reads.append(place)
        if needs_grad and place[0] != OWN and place[0] not in (len(self.segments) - 1, len(self.segments) - 2):
            segment.shares_grad = True
        return needs_grad

    def _place_of(self, tensor: Tensor, block: str | None) -> Place:
        own = self._own.get(id(tensor))
        if own is not None:
            kind, name, geometry = own
            if block is not None and name.startswith(f"{block}."):
                return OWN, kind, name[len(block) :], geometry
            return GIVEN, kind, name
        found = self._places.get(id(tensor))
        if found is not None:
            return found
        self._alive.append(tensor)
        if (
            not is_fake(tensor)
            and torch_internals.device_of(tensor).type == "cpu"
            and tensor.numel() <= _LARGEST_CONSTANT
        ):
            return CONSTANT, _geometry(tensor), repr(torch_internals.values_of(tensor))
        return UNKNOWN, id(self), id(tensor)


def _geometry(tensor: Tensor) -> Any:
    return tensor.shape, tensor.stride(), tensor.dtype, torch_internals.device_of(tensor)
