"""Decide when the plans of a model become CUDA graphs, at the same call on all ranks.

state      from                                    event: a forward with a backward
warm       compile                                 counts; runs as it is
captured   WARM_CALLS forwards, sizes are chosen   replays
refused    an obstacle in the plan                 runs as it is; one warning has said why
off        ranks with different plans              as refused, for every plan from then on

NCCL wants every rank to replay the graph of one capture, or none. So ranks exchange what they would capture, once; and
where there are several, graphs are for calls of one kind: at the first call of another kind they exchange that, and
give graphs up. A rank that alone comes to such a call is named by the exchange.
"""

import hashlib
import logging
import warnings
import weakref
from collections.abc import Iterable
from typing import Any, cast

import torch

from fxzero.comm import agree
from fxzero.comm.group import GroupComm
from fxzero.errors import PlanError
from fxzero.graph.nodes import Role
from fxzero.module.sharded_model import ShardedModel
from fxzero.runtime.executable import Executable
from fxzero.runtime.graphs.obstacles import obstacle
from fxzero.runtime.graphs.phases import PhaseGraphs
from fxzero.runtime.graphs.teardown import drop_before_groups
from fxzero.runtime.graphs.watch import ReplayWatch

logger = logging.getLogger(__name__)

WARM_CALLS = 3
"""Forwards of a plan, each with its backward, before it is captured: kernels are chosen, memory is there."""


class Captures:
    """See the table in the module docstring.

    Args:
        cuda: `torch.cuda`, or what looks like it.
    """

    def __init__(self, sharded: ShardedModel, cuda: Any = torch.cuda) -> None:
        self._sharded, self._cuda = weakref.ref(sharded), cuda
        self._calls: weakref.WeakKeyDictionary[Executable, int] = weakref.WeakKeyDictionary()
        self._captured: weakref.WeakSet[Executable] = weakref.WeakSet()
        self._refused: weakref.WeakSet[Executable] = weakref.WeakSet()
        self._plan: Any = None
        """The one plan that several ranks have captured."""
        self._is_off = False
        self._warned: set[str] = set()
        comm = sharded.comm
        self._watch: ReplayWatch | None = None
        if isinstance(comm, GroupComm):
            self._watch = ReplayWatch(cuda, comm.phases, comm.lost, sharded.timeout.total_seconds())

    def before_forward(self, executable: Executable, *, is_settled: bool) -> None:
        """A call begins; a collective at the call where a plan is to be captured.

        Args:
            is_settled: the plan is not going to be replaced by a better one.
        """
        sharded = self._sharded()
        if self._is_off or not executable.has_backward or sharded is None:
            return
        if executable.graphs is not None:
            if not sharded.comm.is_alone:
                executable.stopwatch = None  # lines of a replay cannot be measured, and all ranks replay or none
            return
        if executable in self._refused:
            return
        is_another = self._plan is not None and executable.plan is not self._plan
        calls = self._calls.get(executable, 0)
        self._calls[executable] = calls + 1
        if is_another or (calls >= WARM_CALLS and is_settled):
            self._decide(sharded, executable, is_another=is_another)

    def _decide(self, sharded: ShardedModel, executable: Executable, *, is_another: bool) -> None:
        why = self._obstacle(sharded, executable)
        if is_another and why is None:
            why = "the call is of another kind than those that ranks have captured together (pad it to their shape)"
        if not sharded.comm.is_alone:
            mine = f"without a graph: {why}" if why else f"with the graph {_digest(executable)}"
            wishes = [line for (line,) in agree.exchange(sharded.group, "cuda graphs", [mine], timeout=sharded.timeout)]
            if why is None and len(set(wishes)) > 1:
                named = "; ".join(f"rank {rank} runs {wish}" for rank, wish in enumerate(wishes))
                why = f"ranks run different plans: {named}"
            if why is not None:
                self._give_up()
        if why is not None:
            self._refused.add(executable)
            self._warn(why)
            return
        self._plan = None if sharded.comm.is_alone else executable.plan
        self._captured.add(executable)
        executable.graphs = graphs = PhaseGraphs(
            executable.step,
            sharded.arena,
            sharded.devices.compute,
            self._cuda,
            self._watch,
            self._warn_of_failure if sharded.comm.is_alone else _raise_failure,
        )
        drop_before_groups(graphs)
        logger.info("forward and backward become CUDA graphs")

    def _obstacle(self, sharded: ShardedModel, executable: Executable) -> str | None:
        return obstacle(executable.step, sharded.devices.compute, is_capturable=sharded.comm.is_capturable)

    def _give_up(self) -> None:
        self._is_off = True
        for executable in cast("Iterable[Executable]", self._captured):
            if executable.graphs is not None:
                executable.graphs.drop()
                executable.graphs = None

    def _warn_of_failure(self, error: RuntimeError) -> None:
        self._warn(f"its capture has failed: {_first_line(error)}")

    def _warn(self, why: str) -> None:
        if why not in self._warned:
            self._warned.add(why)
            warnings.warn(f"cuda_graph=True: this call runs without a CUDA graph, since {why}.", stacklevel=10)


def _raise_failure(error: RuntimeError) -> None:
    """Several ranks replay a capture all or none, and others may have it."""
    raise PlanError(
        f"The plan could not be captured as a CUDA graph: {_first_line(error)}. Compile without cuda_graph=True."
    ) from error


def _first_line(error: RuntimeError) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _digest(executable: Executable) -> str:
    """Stands for what a capture contains: the generated code, and the shapes of a call."""
    shapes = [tuple(node.meta["val"].shape) for node in executable.step.nodes(Role.INPUT)]
    text = f"{shapes}\n{executable.form.code.source}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]
