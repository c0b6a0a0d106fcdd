"""What is chosen from costs, for all plans of a model: first from given or calibrated ones, then from measured ones.

first plan with a backward   the cluster is given, or calibrated; all is chosen from rooflines, buckets included
some steps later             each run of compute was measured: order and what is in flight are chosen again
"""

from __future__ import annotations

import json
import logging
import statistics
from dataclasses import dataclass, field

import torch

from fxzero.comm import agree
from fxzero.comm.without_ranks import PlanningComm
from fxzero.cost.calibrate import calibrate_once
from fxzero.cost.choose_sizes import choose_sizes
from fxzero.cost.job_costs import CostModel, optimizer_bytes
from fxzero.cost.measured import seconds_by_name
from fxzero.cost.model import Cluster, roofline
from fxzero.graph.recipe import Recipe
from fxzero.graph.schedule_text import totals
from fxzero.graph.step import StepGraph
from fxzero.module.one_choice import exchange_recipes
from fxzero.module.sharded_model import ShardedModel
from fxzero.planning.agreed_text import describe_options
from fxzero.planning.plan import with_collectives
from fxzero.runtime.executable import Executable
from fxzero.runtime.stopwatch import Stopwatch, calm_median

logger = logging.getLogger(__name__)

MIN_BYTES = 2**20
"""Models with fewer bytes of parameters are left to the default sizes: one bucket has them all."""
WARM_STEPS, MEASURED_STEPS = 4, 8
"""Steps before compute is measured, and in which it is."""


@dataclass
class TuningRounds:
    """The two rounds, on all ranks alike."""

    is_on: bool
    """False where the user gave the passes."""
    keeps_free: bool
    """What costs no memory at the peak may stay gathered from forward to backward."""
    cluster: Cluster | None = None
    """None until it was calibrated, if it was not given."""
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    optimizers_s: list[float] = field(default_factory=lambda: [0.0] * MEASURED_STEPS)
    """What optimizers took after each backward that is measured; 0 where gradients were accumulated further."""
    _is_tuned: bool = False
    _num_backwards: int = 0
    _measured: Executable | None = None
    """The plan that ran last while steps were counted."""
    _by_name: dict[str, float] = field(default_factory=dict[str, float])
    """Measured seconds of nodes; empty before."""
    _optimizer_s: float = 0.0
    _cpu_s_per_byte: float = 0.0

    # -- at the first plan ---------------------------------------------------------------------------------------

    def must_choose(self, sharded: ShardedModel, step: StepGraph) -> bool:
        """True at the first plan with a backward of a model for which there is something to choose."""
        is_there = not isinstance(sharded.comm, PlanningComm) or self.cluster is not None
        return (
            self.is_on
            and not self._is_tuned
            and step.has_backward
            and sharded.comm.shard_ranks > 1
            and sum(param.nbytes for param in sharded.specs.values()) >= MIN_BYTES
            and is_there
        )

    def choose(self, sharded: ShardedModel, captured: StepGraph, topic: str) -> None:
        """Calibrate, if the cluster was not given, and settle on the choice of rank 0; a collective."""
        # Before a link is measured: every rank is there, and will measure it too.
        agree.agree(sharded.group, topic, describe_options(sharded.agreed), timeout=sharded.timeout)
        if self.cluster is None:
            dtype = next(iter(sharded.specs.values())).dtypes.compute
            self.cluster = calibrate_once(
                sharded.comm, sharded.group, sharded.devices.compute, dtype, topic, sharded.timeout
            )
            logger.info("calibrated: %s", self.cluster)
        with agree.reporting_failure(sharded.group, topic):
            gathering = with_collectives(captured, sharded.recipe)
            own = choose_sizes(gathering, sharded.recipe, self._model(sharded), keeps_free=self.keeps_free)
        sharded.recipe = self._settle(sharded, own, topic)
        self._is_tuned = True

    def _settle(self, sharded: ShardedModel, own: Recipe, topic: str) -> Recipe:
        """Ranks may have other shapes, and so other choices: all take that of the first rank."""
        return exchange_recipes(sharded, own, topic)[0]

    def costs_of(self, sharded: ShardedModel) -> CostModel | None:
        """What gives the costs of any step of this model; None where no cluster is known."""
        return None if self.cluster is None else self._model(sharded)

    def _model(self, sharded: ShardedModel) -> CostModel:
        assert self.cluster is not None
        nbytes = optimizer_bytes(sharded.specs.values(), sharded.comm.shard_ranks, sharded.state_per_element)
        backend, measured = sharded.comm.backend, (self._by_name, self._optimizer_s, self._cpu_s_per_byte)
        return CostModel(self.cluster, backend, nbytes, *measured)

    # -- some steps later ----------------------------------------------------------------------------------------

    def measures(self, executable: Executable) -> bool:
        """True in the steps in which compute is measured, on processors."""
        if not self._is_time or executable.device.type != "cpu":
            return False
        step = executable.step
        return step.has_backward and step.synchronize and not step.resident

    @property
    def _is_time(self) -> bool:
        return self._is_tuned and WARM_STEPS <= self._num_backwards < WARM_STEPS + MEASURED_STEPS

    @property
    def is_due(self) -> bool:
        """True once enough steps were measured, until the choice was made again."""
        return self._is_tuned and self._num_backwards == WARM_STEPS + MEASURED_STEPS

    def after_backward(self, executable: Executable) -> None:
        """Count the steps: ranks do so alike, whatever their shapes."""
        if self._is_tuned and self._num_backwards <= WARM_STEPS + MEASURED_STEPS:
            self._num_backwards += 1
            self._measured = executable

    def after_optimizer(self, seconds: float) -> None:
        """An optimizer's step is over."""
        if self._is_time:
            self.optimizers_s[self._num_backwards - WARM_STEPS] += seconds

    def choose_again(self, sharded: ShardedModel) -> bool:
        """Choose once more, from what was measured; a collective. True if that changes plans."""
        assert self.cluster is not None and self._measured is not None
        self._num_backwards += 1
        step, self._measured = self._measured.step, None
        optimizer_s = calm_median([seconds for seconds in self.optimizers_s if seconds])
        own = [optimizer_s, calm_median(self.stopwatch.others), *self.stopwatch.medians()]
        self.stopwatch = Stopwatch()
        posts = agree.exchange(sharded.group, "costs", [json.dumps(own)], timeout=sharded.timeout)
        everyone: list[list[float]] = [json.loads(line) for (line,) in posts]
        if len({len(each) for each in everyone}) > 1:
            logger.info("ranks measured different steps; the plan stays as it is")
            return False
        self._optimizer_s, others_s, *measured = [statistics.median(values) for values in zip(*everyone, strict=True)]
        before = own_choice = sharded.recipe
        with agree.reporting_failure(sharded.group, "costs"):
            self._cpu_s_per_byte = self._cpu_of_a_byte(step, others_s)
            self._by_name = seconds_by_name(step, roofline(step, self.cluster, sharded.comm.backend), measured)
            if self._by_name:
                own_choice = choose_sizes(step, before, self._model(sharded), keeps_free=self.keeps_free)
        sharded.recipe = self._settle(sharded, own_choice, "costs")
        is_changed = sharded.recipe != before
        logger.info("chosen again from measured costs: %s", sharded.recipe if is_changed else "no change")
        return is_changed

    def _cpu_of_a_byte(self, step: StepGraph, others_s: float) -> float:
        """What other threads took for each byte that was sent; with threads that compute, what was calibrated."""
        assert self.cluster is not None
        moved = totals(step)
        sent = moved.gathered_bytes + moved.reduced_bytes
        return others_s / sent if torch.get_num_threads() == 1 and sent else self.cluster.link.cpu_s_per_byte
