"""Captures a call of a model with repeated blocks: most of them are rehearsed, and not traced."""

import contextlib
import logging
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from fxzero.capture.assemble import assemble
from fxzero.capture.joint import Joint, Tracing, Watch
from fxzero.capture.repeats.compare import check_autograd, check_traced
from fxzero.capture.repeats.find import Run, blocks_of, runs_of
from fxzero.capture.repeats.record import NotRepeatedError, Record
from fxzero.capture.repeats.stamp import stamp
from fxzero.capture.slots import Read
from fxzero.capture.trace import functional
from fxzero.capture.values.branches import are_equal
from fxzero.capture.writes import Output, Write
from fxzero.graph.layout import ParamSpec
from fxzero.graph.sharding import Sharding
from fxzero.graph.step import StepGraph

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stamped:
    """A captured step, most of whose blocks are copies."""

    step: StepGraph
    joint: Joint
    reads: list[Read]
    """What the whole forward read of the Python state."""


def stamped(
    make: Callable[[], Tracing],
    model: nn.Module,
    params: Mapping[str, ParamSpec],
    sharding: Sharding,
    watch: Watch | None = None,
) -> Stamped | None:
    """Rehearse the whole forward, trace it with most of its repeated blocks left out, and stamp these.

    Args:
        make: makes a trace that has not run.
        watch: sees the operators of the rehearsal.

    Returns:
        None if there are no such blocks, or if it is not certain that a trace of the whole model gives the same.
    """
    blocks = blocks_of(model)
    if not blocks:
        return None
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            found = _stamped(make, model, blocks, params, sharding, watch)
    except NotRepeatedError as why:
        logger.info("the whole model is traced, though it has repeated blocks: %s", why)
        return None
    except Exception as error:  # which a trace of the whole model raises again, and explains
        logger.debug("repeated blocks are not traced once: %s", error)
        return None
    for each in warned:
        warnings.warn_explicit(each.message, each.category, each.filename, each.lineno, source=each.source)
    return found


def _stamped(
    make: Callable[[], Tracing],
    model: nn.Module,
    blocks: Mapping[int, str],
    params: Mapping[str, ParamSpec],
    sharding: Sharding,
    watch: Watch | None,
) -> Stamped:
    whole, rehearsal = Record(blocks), make()
    rehearsal.watch = watch
    _run(rehearsal, whole, rehearses=True)
    _check_rehearsal(rehearsal, whole)
    runs = runs_of(whole.segments)
    if not runs:
        raise NotRepeatedError("no blocks are equal")
    check_autograd(whole, runs)
    paths = [segment.path for segment in whole.segments]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the rehearsal has warned
        traced, tracing = Record(blocks), make()
        tracing.reads.begin_behind(rehearsal.reads)
        left_out = {str(paths[index]) for run in runs for index in run.skipped}
        tracing.left_out = frozenset(name for name, spec in params.items() if _lies_in(name, left_out, spec))
        with _left_out(model, left_out, traced):
            root = _run(tracing, traced, rehearses=False)
    check_traced(whole, traced, runs)
    is_alike = are_equal(tracing.joint.branches, rehearsal.joint.branches)
    if traced.why_not is not None or not is_alike or _described(tracing.joint) != _described(rehearsal.joint):
        raise NotRepeatedError("the forward leaves other things behind if blocks are left out")
    if tracing.read_as_inputs(root, list(tracing.reads.found.values())):
        raise NotRepeatedError("the forward reads tensors of the Python state")
    step = assemble(functional(root, tracing.device), tracing.joint, model, params, sharding)
    stamp(step, runs, paths)
    _log(runs, paths)
    return Stamped(step, rehearsal.joint, list(rehearsal.reads.found.values()))


def _run(tracing: Tracing, record: Record, *, rehearses: bool) -> Any:
    tracing.record, tracing.rehearses = record, rehearses
    try:
        return tracing.run()
    except Exception:
        tracing.before.undo_structure()
        raise


def _check_rehearsal(rehearsal: Tracing, record: Record) -> None:
    joint = rehearsal.joint
    if rehearsal.before.has_new_structure:
        rehearsal.before.undo_structure()
        raise NotRepeatedError("the forward adds hooks or submodules")
    reasons = {
        "the forward leaves tensors behind in the Python state": any(map(_has_tensors, joint.writes)),
        "hooks or checks observe tensors": rehearsal.observers.are_there,
        "the forward binds or writes buffers or parameters": joint.rebound,
        "the backward runs Python code": record.runs_python,
        f"there is {record.why_not}": record.why_not,
    }
    for reason, holds in reasons.items():
        if holds:
            raise NotRepeatedError(reason)


def _has_tensors(write: Write) -> bool:
    return any(isinstance(leaf, Output) for leaf in write.template.leaves)


def _described(joint: Joint) -> Any:
    """What the graph of a step must agree with, beside branches."""
    return replace(joint, writes=(), observers=(), branches=())


def _lies_in(name: str, paths: set[str], spec: ParamSpec) -> bool:
    """True for a parameter of a block that is left out. Should anything else read it, the trace fails."""
    path = name.rpartition(".")[0]
    while path and path not in paths:
        path = path.rpartition(".")[0]
    return bool(path) and spec.parallel is None


@contextlib.contextmanager
def _left_out(model: nn.Module, paths: set[str], record: Record) -> Generator[None]:
    """Let blocks return what the block before them did, in the block."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return record.last_output

    attributes = [vars(module) for path, module in model.named_modules() if path in paths]
    before = [each.get("forward") for each in attributes]
    try:
        for each in attributes:
            each["forward"] = forward
        yield
    finally:
        for each, own in zip(attributes, before, strict=True):
            if own is None:
                del each["forward"]
            else:
                each["forward"] = own


def _log(runs: Sequence[Run], paths: Sequence[str | None]) -> None:
    for run in runs:
        first, last = paths[run.skipped.start], paths[run.skipped.stop - 1]
        logger.info("%s to %s (%d blocks) are stamped from %s", first, last, len(run.skipped), paths[run.first])
