"""Tune the plans of one model: costs are given or measured, one choice is made from them, and once made again.

first plan with a backward   the cluster is given, or calibrated; all is chosen from rooflines, buckets included
some steps later             each run of compute was measured: order and what is in flight are chosen again
"""

from __future__ import annotations

import json
import logging
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from fxzero.comm import agree
from fxzero.comm.without_ranks import PlanningComm
from fxzero.cost.calibrate import calibrate, median_of_ranks
from fxzero.cost.choose_sizes import Tuning
from fxzero.cost.job_costs import CostModel, choose_again, choose_sizes, optimizer_bytes
from fxzero.cost.measured import seconds_by_name
from fxzero.cost.model import Cluster, roofline
from fxzero.graph.schedule_text import totals
from fxzero.graph.step import StepGraph
from fxzero.module.optimizer_classes import state_per_element
from fxzero.passes import Pass
from fxzero.planning.agreed_text import describe_options
from fxzero.runtime.executable import Executable
from fxzero.runtime.stopwatch import Stopwatch, calm_median

if TYPE_CHECKING:
    from fxzero.module.engine import Engine

logger = logging.getLogger(__name__)

MIN_BYTES = 2**20
"""Models with fewer bytes of parameters are left to the default sizes: one bucket has them all."""
WARM_STEPS, MEASURED_STEPS = 4, 8
"""Steps before compute is measured, and in which it is."""


@dataclass
class Tuner:
    """What is decided from costs, for all plans of a model and on all ranks alike."""

    is_on: bool
    """False where the user gave the passes."""
    keeps_free: bool
    """What costs no memory at the peak may stay gathered from forward to backward."""
    cluster: Cluster | None = None
    """None until it was calibrated, if it was not given."""
    tuning: Tuning | None = None
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    optimizers_s: list[float] = field(default_factory=lambda: [0.0] * MEASURED_STEPS)
    """What optimizers took after each backward that is measured; 0 where gradients were accumulated further."""
    _num_backwards: int = 0
    _measured: Executable | None = None
    """The plan that ran last while steps were counted."""
    _by_name: dict[str, float] = field(default_factory=dict[str, float])
    """Measured seconds of nodes; empty before."""
    _optimizer_s: float = 0.0
    _cpu_s_per_byte: float = 0.0

    # -- at the first plan ---------------------------------------------------------------------------------------

    def must_choose(self, engine: Engine, step: StepGraph) -> bool:
        """True at the first plan with a backward of a model for which there is something to choose."""
        nbytes = sum(param.nbytes for param in engine.specs.values())
        is_there = not isinstance(engine.comm, PlanningComm) or self.cluster is not None
        return (
            self.is_on
            and self.tuning is None
            and step.has_backward
            and engine.comm.shard_ranks > 1
            and nbytes >= MIN_BYTES
            and is_there
        )

    def choose(self, engine: Engine, captured: StepGraph, topic: str) -> None:
        """Calibrate, if the cluster was not given, and settle on the choice of rank 0; a collective."""
        timeout = engine.options.timeout
        # Before a link is measured: every rank is there, and will measure it too.
        agree.agree(engine.group, topic, describe_options(engine.options.agreed()), timeout=timeout)
        if self.cluster is None:
            dtype = next(iter(engine.specs.values())).dtype
            own = calibrate(engine.comm, engine.options.device, dtype)
            self.cluster = median_of_ranks(own, engine.group, topic, timeout)
            logger.info("calibrated: %s", self.cluster)
        with agree.reporting_failure(engine.group, topic):
            model = self.costs_of(engine)
            assert model is not None
            own = choose_sizes(captured, engine.options.passes, model, self.keeps_free, _buckets(engine))
        self.tuning = self._settle(engine, own, topic)

    def _settle(self, engine: Engine, own: Tuning, topic: str) -> Tuning:
        """Ranks may have other shapes, and so other choices: all take that of the first rank."""
        lines = agree.exchange(engine.group, topic, own.lines(), timeout=engine.options.timeout)
        return Tuning.of_lines(lines[0])

    def passes(self, passes: Sequence[Pass]) -> list[Pass]:
        """A list of passes with what was chosen."""
        return list(passes) if self.tuning is None else self.tuning.passes(passes)

    def costs_of(self, engine: Engine) -> CostModel | None:
        """What gives the costs of any step of this model; None where no cluster is known."""
        if self.cluster is None:
            return None
        return CostModel(
            self.cluster,
            engine.comm.backend,
            optimizer_bytes(engine.specs.values(), engine.comm.shard_ranks, state_per_element(engine.optimizers)),
            self._by_name,
            self._optimizer_s,
            self._cpu_s_per_byte,
        )

    # -- some steps later ----------------------------------------------------------------------------------------

    def measures(self, executable: Executable) -> bool:
        """True in the steps in which compute is measured, on processors."""
        if not self._is_time or executable.device.type != "cpu":
            return False
        step = executable.step
        return step.has_backward and step.synchronize and not step.resident

    @property
    def _is_time(self) -> bool:
        return self.tuning is not None and WARM_STEPS <= self._num_backwards < WARM_STEPS + MEASURED_STEPS

    @property
    def is_due(self) -> bool:
        """True once enough steps were measured, until the choice was made again."""
        return self.tuning is not None and self._num_backwards == WARM_STEPS + MEASURED_STEPS

    def after_backward(self, executable: Executable) -> None:
        """Count the steps: ranks do so alike, whatever their shapes."""
        if self.tuning is not None and self._num_backwards <= WARM_STEPS + MEASURED_STEPS:
            self._num_backwards += 1
            self._measured = executable

    def after_optimizer(self, seconds: float) -> None:
        """An optimizer's step is over."""
        if self._is_time:
            self.optimizers_s[self._num_backwards - WARM_STEPS] += seconds

    def choose_again(self, engine: Engine) -> bool:
        """Choose once more, from what was measured; a collective. True if that changes plans."""
        assert self.cluster is not None and self.tuning is not None and self._measured is not None
        self._num_backwards += 1
        step, self._measured = self._measured.step, None
        optimizer_s = calm_median([seconds for seconds in self.optimizers_s if seconds])
        own = [optimizer_s, calm_median(self.stopwatch.others), *self.stopwatch.medians()]
        self.stopwatch = Stopwatch()
        posts = agree.exchange(engine.group, "costs", [json.dumps(own)], timeout=engine.options.timeout)
        everyone: list[list[float]] = [json.loads(line) for (line,) in posts]
        if len({len(each) for each in everyone}) > 1:
            logger.info("ranks measured different steps; the plan stays as it is")
            return False
        self._optimizer_s, others_s, *measured = [statistics.median(values) for values in zip(*everyone, strict=True)]
        before = own_choice = self.tuning
        with agree.reporting_failure(engine.group, "costs"):
            self._cpu_s_per_byte = self._cpu_of_a_byte(step, others_s)
            self._by_name = seconds_by_name(step, roofline(step, self.cluster, engine.comm.backend), measured)
            model = self.costs_of(engine)
            if self._by_name and model is not None:
                own_choice = choose_again(step, engine.options.passes, model, self.keeps_free, _buckets(engine))
        settled = self._settle(engine, own_choice, "costs")
        self.tuning = replace(settled, bucket_bytes=before.bucket_bytes, head_bytes=before.head_bytes)
        logger.info("chosen again from measured costs: %s", "no change" if self.tuning == before else self.tuning)
        return self.tuning != before

    def _cpu_of_a_byte(self, step: StepGraph, others_s: float) -> float:
        """What other threads took for each byte that was sent; with threads that compute, what was calibrated."""
        assert self.cluster is not None
        moved = totals(step)
        sent = moved.gathered_bytes + moved.reduced_bytes
        return others_s / sent if torch.get_num_threads() == 1 and sent else self.cluster.link.cpu_s_per_byte


def _buckets(engine: Engine) -> list[tuple[str, ...]] | None:
    """The members of each bucket; None before the layout is fixed."""
    return None if engine.shards is None else [bucket.fqns for bucket in engine.shards.layout.buckets]
