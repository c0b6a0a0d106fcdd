"""The optimizers that step whole parameters of one model: which there are, and when their steps begin and end."""

import logging
import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

import torch

from fxzero import torch_internals
from fxzero.checkpoint.pieces import Pieces
from fxzero.errors import OptimizerError
from fxzero.optimizers.classes import steps_wholes
from fxzero.optimizers.state import ParamShard, name_of, parameters_of
from fxzero.optimizers.whole.owners import owners_of, ranges_of
from fxzero.optimizers.whole.state import note_state
from fxzero.optimizers.whole.step import Matrix, WholeStep

logger = logging.getLogger(__name__)


class WholeSteps:
    """Lets parameters of one model be whole in the steps of optimizers that need it.

    Args:
        pieces: returns what knows the layout and the ranks, once there are shards. It must not hold the model.
        phase: begins a phase of all ranks inside of an optimizer's step; must not hold the model.
    """

    def __init__(
        self, pieces: Callable[[], Pieces | None], phase: Callable[[str], AbstractContextManager[object]]
    ) -> None:
        self._pieces, self._phase = pieces, phase
        self._steps: weakref.WeakKeyDictionary[torch.optim.Optimizer, WholeStep] = weakref.WeakKeyDictionary()
        self._depth = 0
        """Steps that one optimizer takes inside of each other now."""

    def watch(self, optimizer: torch.optim.Optimizer, shards: Mapping[int, ParamShard]) -> None:
        """An optimizer is about to take its first step with the parameters that it has now.

        Raises:
            OptimizerError: it steps whole parameters, and nodes share the shards.
        """
        pieces = self._pieces()
        params = [param for _, param in parameters_of(optimizer, shards)]
        if not params or pieces is None or not steps_wholes(optimizer):
            return
        if pieces.comm.sharding.shards_across:
            raise OptimizerError(
                f"{name_of(optimizer)} steps whole parameters, which cannot travel between nodes that share shards "
                '(across="shard"). Let nodes be replicas, or use one group of all ranks.'
            )
        owners = owners_of(optimizer, shards, pieces.layout)
        specs = [shards[id(param)].spec for param in params]
        matrices = [
            Matrix(param, spec, ranges_of(pieces.layout, spec), owners[id(param)])
            for param, spec in zip(params, specs, strict=True)
        ]
        self._steps[optimizer] = WholeStep(matrices, pieces.comm, self._phase)

    def before_step(self, optimizer: torch.optim.Optimizer, *, is_training: bool) -> None:
        """Let the parameters be whole.

        Args:
            is_training: False for the step in which torch.distributed.checkpoint lets an optimizer make its state.
        """
        step = self._steps.get(optimizer)
        if step is None:
            return
        if step.has_begun and torch_internals.is_nested_step(optimizer):
            self._depth += 1
            return
        if step.has_begun:
            step.give_up()
            raise OptimizerError(
                f"The step of {name_of(optimizer)} before ended in an error; the gradients of its parameters are gone. "
                "Run forward and backward again."
            )
        self._depth = 1
        if is_training:
            step.begin()
            note_state(optimizer)
        else:
            step.begin_made_up()

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the parameters be shards again, with what the step has made of them."""
        step = self._steps.get(optimizer)
        if step is not None and step.has_begun:
            self._depth -= 1
            if self._depth == 0:
                step.end()

    def restore(self) -> None:
        """Let parameters be shards as they were before a step that ended in an error, without gradients."""
        for optimizer, step in self._steps.items():
            if step.has_begun:
                step.give_up()
                logger.warning(
                    "A step of %s ended in an error: the gradients of its parameters are dropped.", name_of(optimizer)
                )
