"""Choose the sizes and the order of the plans of a model from costs: first estimated ones, then measured ones.

state       from                               events
untuned     compile                            `choose`, at the first plan with a backward: calibrates the cluster if
                                               none is given, and chooses all, buckets included, from rooflines
warm        `choose`                           `after_backward`: counts
measuring   WARM_STEPS backwards               `after_backward`: counts; runs of compute are measured
due         MEASURED_STEPS backwards later     `choose_again`: chooses order and bytes in flight from measured seconds
done        `choose_again`
"""

import json
import logging
import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from fxzero.comm import agree
from fxzero.comm.without_ranks import PlanningComm
from fxzero.cost.calibrate import calibrate_once
from fxzero.cost.choose_sizes import choose_sizes
from fxzero.cost.job_costs import CostModel, optimizer_bytes
from fxzero.cost.measured import CLOCKS, MEASURED_STEPS, ends_of_runs, seconds_by_name, seconds_by_run
from fxzero.cost.model import Cluster, roofline
from fxzero.graph.layout import ParamSpec
from fxzero.graph.schedule_text import totals
from fxzero.graph.step import StepGraph
from fxzero.module.sharded_model import ShardedModel
from fxzero.planning.agreed_text import describe_options
from fxzero.planning.plan import with_collectives
from fxzero.runtime.executable import Executable
from fxzero.runtime.stopwatch import Stopwatch, calm_median

logger = logging.getLogger(__name__)

MIN_BYTES = 2**20
"""Models with fewer bytes of parameters keep the default sizes: one bucket has all parameters."""
WARM_STEPS = 4
"""Steps before compute is measured."""


@dataclass
class TuningRounds:
    """The two rounds of choices for one model, on all ranks alike."""

    is_on: bool
    """False where the user gave the passes."""
    keeps_free: bool
    """Buckets may stay gathered from forward to backward where that costs no memory at the peak."""
    cluster: Cluster | None = None
    """The user's cluster; without one, None until it was calibrated."""
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    optimizers_s: list[float] = field(default_factory=lambda: [0.0] * MEASURED_STEPS)
    """Seconds of optimizers behind each backward from the last warm one on; 0 where gradients were accumulated."""
    _is_tuned: bool = False
    _num_backwards: int = 0
    """Backwards since `choose`."""
    _measured: Executable | None = None
    """The executable that ran last while backwards were counted."""
    _by_name: dict[str, float] = field(default_factory=dict[str, float])
    """Measured seconds of nodes by name; empty before they are measured."""
    _optimizer_s: float = 0.0
    _cpu_s_per_byte: float = 0.0

    # -- at the first plan ---------------------------------------------------------------------------------------

    def _must_choose(self, sharded: ShardedModel, step: StepGraph) -> bool:
        if not self.is_on or self._is_tuned or not step.has_backward or sharded.comm.shard_ranks == 1:
            return False
        is_large = sum(param.nbytes for param in sharded.specs.values()) >= MIN_BYTES
        return is_large and (self.cluster is not None or not isinstance(sharded.comm, PlanningComm))

    def choose(self, sharded: ShardedModel, captured: StepGraph, topic: str) -> None:
        """Take the choice of rank 0 on all ranks, at the first plan with a backward; a collective then.

        Does nothing where there is nothing to choose: on one rank, for a small model, or with passes of the user.
        """
        if not self._must_choose(sharded, captured):
            return
        # A link is measured only once every rank has come to measure it.
        agree.agree(sharded.group, topic, describe_options(sharded.agreed), timeout=sharded.timeout)
        if self.cluster is None:
            dtype, device = _dtype_of_most(sharded.specs.values()), sharded.devices.compute
            self.cluster = calibrate_once(sharded.comm, sharded.group, device, dtype, topic, sharded.timeout)
            logger.info("calibrated: %s", self.cluster)
        with agree.reporting_failure(sharded.group, topic):
            gathering = with_collectives(captured, sharded.recipe)
            own = choose_sizes(gathering, sharded.recipe, self._model(sharded), keeps_free=self.keeps_free)
        sharded.recipe = sharded.exchange_recipes(own, topic)[0]  # ranks with other shapes have chosen otherwise
        self._is_tuned = True

    def costs_of(self, sharded: ShardedModel) -> CostModel | None:
        """The model of the costs of any step; None where no cluster is known."""
        return None if self.cluster is None else self._model(sharded)

    def _model(self, sharded: ShardedModel) -> CostModel:
        assert self.cluster is not None
        nbytes = optimizer_bytes(sharded.specs.values(), sharded.comm.shard_ranks, sharded.state_per_element)
        backend, measured = sharded.comm.backend, (self._by_name, self._optimizer_s, self._cpu_s_per_byte)
        return CostModel(self.cluster, backend, nbytes, *measured)

    # -- some steps later ----------------------------------------------------------------------------------------

    def stopwatch_for(self, executable: Executable) -> Stopwatch | None:
        """What measures the coming step: for a choice, for somebody who asked for the seconds of its lines, or both."""
        step, asked = executable.step, executable.lines_to_measure
        clock = CLOCKS.get(executable.device.type)
        if not self._is_time or not executable.has_backward or clock is None:
            return asked
        if not step.synchronize or step.resident:
            return asked
        watch = self.stopwatch
        watch.also = asked
        if executable.device.type == "cuda":
            watch.cuda = torch.cuda
        watch.ends = None if clock.every_line or asked is not None else ends_of_runs(step)
        return watch

    @property
    def _is_time(self) -> bool:
        return WARM_STEPS <= self._num_backwards < WARM_STEPS + MEASURED_STEPS

    @property
    def is_due(self) -> bool:
        """True from the last measured backward to `choose_again`."""
        return self._num_backwards == WARM_STEPS + MEASURED_STEPS

    @property
    def is_settled(self) -> bool:
        """True if no plan is going to be replaced by a better one."""
        return not self._is_tuned or self._num_backwards > WARM_STEPS + MEASURED_STEPS

    def after_backward(self, executable: Executable) -> None:
        """Count a backward, as all ranks do whatever their shapes."""
        if self._is_tuned and self._num_backwards <= WARM_STEPS + MEASURED_STEPS:
            self._num_backwards += 1
            self._measured = executable

    def after_optimizer(self, seconds: float) -> None:
        """Add the seconds of an optimizer's step to those behind the last backward, while they are measured."""
        if self._is_time:
            self.optimizers_s[self._num_backwards - WARM_STEPS] += seconds

    def choose_again(self, sharded: ShardedModel) -> bool:
        """Choose once more, from measured seconds; a collective. True if that changes plans."""
        assert self.cluster is not None and self._measured is not None
        self._num_backwards += 1
        step, self._measured = self._measured.step, None
        clock = CLOCKS.get(sharded.devices.compute.type, CLOCKS["cpu"])
        self.stopwatch.read()
        optimizer_s = calm_median([seconds for seconds in self.optimizers_s if seconds and clock.sees_host])
        own = [optimizer_s, calm_median(self.stopwatch.others), *seconds_by_run(step, self.stopwatch.medians())]
        self.stopwatch = Stopwatch()
        posts = agree.exchange(sharded.group, "costs", [json.dumps(own)], timeout=sharded.timeout)
        everyone: list[list[float]] = [json.loads(line) for (line,) in posts]
        if len({len(each) for each in everyone}) > 1:
            logger.info("ranks measured different steps; the plan stays as it is")
            return False
        self._optimizer_s, others_s, *measured = [statistics.median(values) for values in zip(*everyone, strict=True)]
        before = chosen = sharded.recipe
        with agree.reporting_failure(sharded.group, "costs"):
            on_link = self.cluster.link.cpu_s_per_byte
            self._cpu_s_per_byte = self._cpu_of_a_byte(step, others_s) if clock.sees_host else on_link
            estimated = roofline(step, self.cluster, sharded.comm.backend)
            self._by_name = seconds_by_name(step, estimated, measured, counts_waits=clock.counts_waits)
            if self._by_name:
                chosen = choose_sizes(step, before, self._model(sharded), keeps_free=self.keeps_free)
        sharded.recipe = sharded.exchange_recipes(chosen, "costs")[0]
        is_changed = sharded.recipe != before
        logger.info("chosen again from measured costs: %s", sharded.recipe if is_changed else "no change")
        return is_changed

    def _cpu_of_a_byte(self, step: StepGraph, others_s: float) -> float:
        """Seconds of other threads for each byte sent; the calibrated ones if other threads compute too."""
        assert self.cluster is not None
        moved = totals(step)
        sent = moved.gathered_bytes + moved.reduced_bytes
        return others_s / sent if torch.get_num_threads() == 1 and sent else self.cluster.link.cpu_s_per_byte


def _dtype_of_most(params: Iterable[ParamSpec]) -> torch.dtype:
    """The dtype in which most elements of parameters are read; matrix products of integers are made in another one."""
    numel = Counter[torch.dtype]()
    for param in params:
        if param.dtypes.compute.is_floating_point:
            numel[param.dtypes.compute] += param.numel
    return max(numel, key=lambda dtype: numel[dtype], default=torch.float32)
