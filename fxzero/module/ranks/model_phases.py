"""The phases of one model, named by word, step and micro-batch, and the options of its optimizers."""

from __future__ import annotations

import operator
import weakref
import zlib
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from fxzero.comm.heartbeat import heartbeat, report
from fxzero.comm.phases import PhaseLog
from fxzero.errors import FxzeroError
from fxzero.optimizers.marks import PREFIX
from fxzero.runtime.executable import Writes

_requires_grad = operator.attrgetter("requires_grad")


@dataclass
class _Watched:
    """An optimizer whose options are compared."""

    reference: weakref.ref[torch.optim.Optimizer]
    seen: list[dict[str, Any]] | None = None
    """The options of each group, as they were seen last."""
    lines: list[str] = field(default_factory=list[str])
    """Its description at that time."""
    has_numbers: bool = False
    """True if it has options in tensors, which may change in place."""


class _UntilTheEnd(AbstractContextManager[None]):
    """Ends the phase that began last with a block, and reports an error that leaves it."""

    def __init__(self, phases: ModelPhases, log: PhaseLog) -> None:
        self._phases, self._log = weakref.proxy(phases), log

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None:
            self._phases.failed(error)
        self._log.end()


class ModelPhases:
    """Begins and ends the phases of one model in the log of its group.

    Args:
        log: the phases of all models of the group.
        name: the name of the model's class.
        params: the parameters by name.
        meet: returns once all ranks have come.
        undo: drops the gradients of the model, also those that wait to be reduced, and what forwards wrote into
            parameters since ranks met.
    """

    def __init__(
        self,
        log: PhaseLog,
        name: str,
        params: Mapping[str, torch.nn.Parameter],
        meet: Callable[[], object] = lambda: None,
        undo: Callable[[], object] = lambda: None,
    ) -> None:
        log.num_models += 1
        self._log, self._name = log, f"{name} (model {log.num_models})"
        self._fqns = {id(param): fqn for fqn, param in params.items()}
        self._params = tuple(params.values())
        self.trained = self._trained_now()
        """Every parameter's `requires_grad` at the call that began last."""
        self._trained_at_first: tuple[bool, ...] | None = None
        """The same when the layout was fixed; None before."""
        self._change = ""
        """Which parameters are trained, where others were at first, as a part of the names of phases."""
        self._written: Writes | None = None
        self._writes = ""
        """Which parameters the last forward wrote, as a part of the names of phases."""
        self._meet, self._undo = meet, undo
        log.models.add(self)
        self.num_steps = 0
        """Steps that optimizers took with the model's parameters."""
        self._num_backwards = 0
        """Backwards since the last step."""
        self._watched: list[_Watched] = []
        self._digest = 0
        """Of all options that were seen, one after another."""
        self._until_the_end = _UntilTheEnd(self, log)
        self.block = ""
        """The block of the user's code that this rank is in, on whole parameters; empty outside of one."""
        self._may_gather = True

    @contextmanager
    def in_block(self, block: str, *, may_gather: bool) -> Generator[None]:
        """Refuse phases inside of a block of the user's code, in which parameters are no shards.

        Args:
            may_gather: all ranks are in the block, so that they can gather further parameters in it.
        """
        before = self.block, self._may_gather
        self.block, self._may_gather = block, self._may_gather and may_gather
        try:
            yield
        finally:
            self.block, self._may_gather = before

    @contextmanager
    def gathering(self) -> Generator[None]:
        """Let phases begin that gather further parameters for a block, if all ranks are in it."""
        before = self.block
        self.block = "" if self._may_gather else before
        try:
            yield
        finally:
            self.block = before

    @property
    def name(self) -> str:
        """The model's class, and its number among the models that were compiled for these ranks."""
        return self._name

    @property
    def moment(self) -> tuple[int, int]:
        """Steps of optimizers, and backwards since the last one."""
        return self.num_steps, self._num_backwards

    def is_fixed(self) -> None:
        """Ranks have agreed on the layout of this model, and on which parameters it trains."""
        self.trained = self._trained_at_first = self._trained_now()

    def note_trained(self) -> None:
        """A call is about to begin, to which it matters which parameters are trained."""
        if (trained := self._trained_now()) != self.trained:
            self.trained = trained
            self._change = self._describe_change()

    def _trained_now(self) -> tuple[bool, ...]:
        return tuple(map(_requires_grad, self._params))

    def _describe_change(self) -> str:
        first = self._trained_at_first or self.trained
        pairs = zip(self._fqns.values(), first, self.trained, strict=True)
        changed = [f"{fqn} {'trained' if now else 'frozen'}" for fqn, before, now in pairs if before != now]
        return f", with {_in_short(changed)} since its first call" if changed else ""

    def note_writes(self, writes: Writes | None) -> None:
        """A forward is over that has written parameters, or none; the same ones on all ranks, in the same way."""
        if writes != self._written:
            self._written, self._writes = writes, ""
            if writes is not None:
                fqns, computation = writes
                self._writes = f", behind a forward that wrote {_in_short(sorted(fqns))} by computation {computation:x}"

    def phase(self, word: str) -> AbstractContextManager[None]:
        """Begin a phase of this model, which ends with the block; other ranks are told of an error that leaves it."""
        self.begin(word)
        return self._until_the_end

    def phase_of_step(self, word: str) -> AbstractContextManager[None]:
        """Begin a phase inside of an optimizer's step, which `before_step` has announced; else as `phase`."""
        depth = self._log.stepping_depth
        try:
            return self.phase(word)
        finally:
            self._log.stepping_depth = depth

    def begin(self, word: str) -> None:
        """A phase begins; `failed` or `end` follows.

        Raises:
            FxzeroError: inside of a block in which parameters are no shards.
        """
        if self.block:
            raise FxzeroError(
                f"{word} of {self._name} inside of `with zero.{self.block}`, where parameters are whole and no shards. "
                "Leave the block first; inside, read and change parameters, and call the model or its parts under "
                "torch.no_grad()."
            )
        if not self._log.members:
            return
        self._log.stepping_depth = 0
        for watched in self._watched:
            self._note_options(watched)
        what = f"{word} of {self._name}, micro-batch {self._num_backwards + 1} of step {self.num_steps + 1}"
        what += self._change + self._writes
        self._log.begin(what, self._digest)

    def failed(self, error: BaseException) -> None:
        """The phase that began last has failed on this rank."""
        report(self._log, error)
        if self._log.members and self._log.stop is None:
            heartbeat().linger(self._log)

    def end(self) -> None:
        """The phase that began last is over."""
        self._log.end()

    def after_backward(self) -> None:
        """A micro-batch is over."""
        self._num_backwards += 1

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer is about to step parameters of the model."""
        if not self._log.members:
            return
        if self._log.stepping_depth:
            self._log.stepping_depth += 1
            return
        self._note_options(self._watched_of(optimizer))
        if self._log.is_together:
            with self.phase("optimizer's step"):
                self._meet()
        self._log.stepping_depth = 1
        self._log.num_steps += 1
        self.num_steps += 1
        self._num_backwards = 0

    def after_step(self) -> None:
        """A step that `before_step` announced is over."""
        self._log.stepping_depth = max(0, self._log.stepping_depth - 1)

    def leave_out(self) -> None:
        """Undo what a step has done that all ranks leave out."""
        self._undo()
        self.note_writes(None)
        self._num_backwards = 0

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Compare the options of an optimizer with those of other ranks from now on."""
        self._watched_of(optimizer)

    def _watched_of(self, optimizer: torch.optim.Optimizer) -> _Watched:
        for watched in self._watched:
            if watched.reference() is optimizer:
                return watched
        self._watched = [each for each in self._watched if each.reference() is not None]
        self._watched.append(_Watched(weakref.ref(optimizer)))
        return self._watched[-1]

    def _note_options(self, watched: _Watched) -> None:
        optimizer = watched.reference()
        if optimizer is None:
            return
        now: list[dict[str, Any]] = optimizer.param_groups  # most values are the objects that they were
        if watched.has_numbers:
            now = _without_tensors(now)
        if now == watched.seen:
            return
        if any(_is_number(value) for group in now for value in group.values()):
            watched.has_numbers = True
        watched.seen = _without_tensors(now)
        lines = self.describe(optimizer)
        if lines == watched.lines:  # an option changed that is not compared
            return
        watched.lines = lines
        self._digest = zlib.crc32("\n".join(lines).encode(), self._digest) & 0x3FFFFFFF
        self._log.options = [line for each in self._watched if each.reference() is not None for line in each.lines]

    def describe(self, optimizer: torch.optim.Optimizer) -> list[str]:
        """An optimizer as text, one group a line; parameters of other models do not count."""
        lines: list[str] = []
        for index, group in enumerate(optimizer.param_groups):
            held = [self._fqns[id(param)] for param in group["params"] if id(param) in self._fqns]
            options = ", ".join(f"{key}={_plain(value)!r}" for key, value in group.items() if _is_compared(key, value))
            members = f"{len(held)} parameters" + (f", {held[0]} to {held[-1]} ({_digest_of(held):x})" if held else "")
            lines.append(f"{type(optimizer).__name__} group {index}: {options}; {members}")
        return lines


def _in_short(changes: list[str]) -> str:
    """The first of some changes, and a digest of all."""
    more = f" and {len(changes) - 1} more changes ({_digest_of(changes):x})" if len(changes) > 1 else ""
    return f"{changes[0]}{more}"


def _digest_of(fqns: list[str]) -> int:
    return zlib.crc32("\n".join(fqns).encode())


def _is_compared(key: str, value: object) -> bool:
    if key == "params" or key.startswith(PREFIX):
        return False
    return isinstance(value, (float, int, str, tuple, list, type(None))) or _is_number(value)


def _is_number(value: object) -> bool:
    """True for a number in a tensor that can be read without waiting for a device."""
    return isinstance(value, torch.Tensor) and value.numel() == 1 and value.device.type == "cpu"


def _without_tensors(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Copies of groups of parameters, with plain numbers in the place of those in tensors."""
    return [{key: _plain(value) for key, value in group.items()} for group in groups]


def _plain(value: Any) -> Any:
    return value.item() if _is_number(value) else value
