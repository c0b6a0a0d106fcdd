"""Trace a model, and let parts that cannot be traced be islands, until the rest of it can."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx

from fxzero.capture.assemble import check_lstm
from fxzero.capture.draws import PythonDrawError
from fxzero.capture.failures import explain
from fxzero.capture.hooks.observers import RemovedHookError, TracedHooksError
from fxzero.capture.hooks.operators import bind as bind_hooks
from fxzero.capture.in_place.functional import functionalize
from fxzero.capture.in_place.temporaries import make_temporaries_functional
from fxzero.capture.islands.find import DrawFinder, module_of
from fxzero.capture.islands.marks import Islands, Marks, NeedsProbeError
from fxzero.capture.islands.operators import bind
from fxzero.capture.islands.probe import NotAnIslandError, error_of
from fxzero.capture.joint import Tracing, call_module, no_autocast
from fxzero.capture.numbers import PinnedNumberError, StandIns
from fxzero.capture.slots import Read
from fxzero.errors import CaptureError

MOST_TRIES = 300
"""Traces of one call: each but the last leaves one part more as it is, or learns of one."""


@dataclass(frozen=True)
class Traced:
    """A traced call whose graph is functional."""

    root: fx.GraphModule
    tracing: Tracing
    reads: list[Read]
    """What the forward read of the Python state."""
    tensors: list[tuple[dict[Any, Any], Any]]
    """The dict and the key of each tensor of it that is an input."""


class Tracer:
    """Traces a call.

    Args:
        make: makes a trace that has not run.
        stand_ins: as of `Tracing`.
        islands: of the model.
    """

    def __init__(
        self,
        make: Callable[[StandIns | None, Marks], Tracing],
        stand_ins: StandIns | None,
        islands: Islands,
        *,
        with_backward: bool,
    ) -> None:
        self._make, self._stand_ins, self._islands = make, stand_ins, islands
        islands.without_grad = not with_backward
        self._running: Tracing | None = None
        self._traced_hooks: frozenset[int] = frozenset()

    def trace(self) -> Traced:
        """Trace as often as it takes.

        Raises:
            CaptureError: neither the model can be traced, nor can what cannot be traced be an island.
            Exception: any other error of a trace.
        """
        first: CaptureError | None = None
        if self._stand_ins is not None:
            self._islands.check_numbers([each.slot for each in self._stand_ins.slots])
        for _ in range(MOST_TRIES):
            try:
                traced = self._trace_once()
                if self._islands.are_settled():
                    self._islands.announce()
                    return traced
            except (PinnedNumberError, RemovedHookError):  # what is no matter of a part
                raise
            except TracedHooksError as error:
                if error.hooks <= self._traced_hooks:
                    raise CaptureError("A hook and the forward both set the same state.") from error
                self._traced_hooks |= error.hooks
            except NeedsProbeError as needs:
                try:
                    self._islands.learn(needs.call)
                except NotAnIslandError as error:
                    self._go_on_around(needs.call.site.fqn, error, first)
            except NotAnIslandError as error:
                self._go_on_around(error.path, error, first)
            except Exception as error:
                explained = explain(error) or self._missed_state(error)
                if explained is None or not self._islands.finds:
                    raise
                first = first or explained
                path = self._place_of(error)
                if path is None:
                    raise
                self._go_on_around(path, explained, first)
        raise CaptureError(f"The model cannot be traced in {MOST_TRIES} tries.") from first

    def _trace_once(self) -> Traced:
        root, tracing = self._run()
        if tracing.before.has_new_structure:  # hooks or submodules that the first forward adds
            root, tracing = self._run()
        reads = list(tracing.reads.found.values())
        self._islands.check_reads(reads)
        tracing.check_numbers(reads)
        known = {(id(each.owner), each.name) for each in reads} | tracing.reads.set_slots
        reads += [each for each in self._islands.guarded() if (id(each.owner), each.name) not in known]
        tensors = tracing.read_as_inputs(root, reads)
        root = functional(root, tracing.device)
        bind(root.graph)
        bind_hooks(root.graph)
        return Traced(root, tracing, reads, tensors)

    def _run(self) -> tuple[fx.GraphModule, Tracing]:
        with self._islands.marked() as marks:
            self._running = tracing = self._make(self._stand_ins, marks)
            tracing.observers.traced = self._traced_hooks
            try:
                return tracing.run(), tracing
            except Exception:
                tracing.before.undo_structure()
                raise

    def _missed_state(self, error: Exception) -> CaptureError | None:
        """An error of its own where forward reads what an island would have set; None for an error of the model."""
        assert self._running is not None
        try:
            self._islands.check_reads(list(self._running.reads.found.values()))
        except CaptureError as missed:
            return missed
        return self._islands.missing_attribute(error)

    def _place_of(self, error: Exception) -> str | None:
        """The path of the module that cannot be traced; None if it is unknown."""
        if isinstance(error, CaptureError) and error.path is not None:
            return error.path
        if isinstance(error, PythonDrawError):
            finder = DrawFinder(self._islands.model, self._islands.names)
            with finder.watching(), contextlib.suppress(Exception):
                self._run()
            return finder.found
        assert self._running is not None
        in_backward = self._running.module_in_backward
        return module_of(error.__traceback__, self._islands.names) if in_backward is None else in_backward

    def _go_on_around(self, path: str | None, error: CaptureError, first: CaptureError | None) -> None:
        """Let a module, or one around it, be an island.

        Raises:
            CaptureError: none can be; it is the first error that there was.
            Exception: the plain model fails too.
        """
        if self._islands.add(path, error):
            return
        raised = first or error
        if (own := self._error_of_eager()) is not None:
            raise own from raised
        if why := self._islands.why_not():
            raised = CaptureError(f"{why} And it cannot be traced: {raised}")
        raise raised from error

    def _error_of_eager(self) -> Exception | None:
        """What the plain model raises for this call; None if it raises nothing, or if its parameters are not there."""
        tracing = self._running
        if tracing is None or any(
            param.is_meta or tracing.params[name].parallel or param.shape != tracing.params[name].shape
            for name, param in tracing.module.named_parameters()
            if name not in tracing.ignored
        ):
            return None
        args, kwargs = tracing.args, dict(tracing.kwargs)
        if tracing.is_method:
            return error_of(tracing.module, partial(tracing.forward, *args, **kwargs))
        return error_of(tracing.module, partial(call_module, tracing.module, tracing.forward, args, kwargs))


def functional(root: fx.GraphModule, device: torch.device) -> fx.GraphModule:
    """The functional graph of a traced one, which changes.

    Raises:
        CaptureError: it has an operator that has no backward outside of autograd.
    """
    make_temporaries_functional(root.graph)
    with no_autocast(device):
        root = functionalize(root)
    check_lstm(root.graph)
    return root
