"""Takes back what a method has done before it touched a shard, so that it can run again in another way."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fxzero import torch_internals
from fxzero.capture.draws import generators_of, restoring_all
from fxzero.capture.reads import Reads
from fxzero.capture.writes import Before
from fxzero.module.registered_tensors import plain_tensors
from fxzero.module.sharded_model import ShardedModel
from fxzero.torch_internals import tree_leaves


def _changes(sharded: ShardedModel) -> dict[str, int]:
    """How often each parameter was changed in place."""
    return {fqn: torch_internals.num_changes([param]) for fqn, param in sharded.params.items()}


class UndoError(Exception):
    """What was done cannot be undone."""


class Undo:
    """What a model, the arguments of a method and the generators hold now, and how to come back to that.

    Of Python state it is what a trace sees: attributes of modules and of plain objects, containers, globals, closures.
    """

    def __init__(self, sharded: ShardedModel, arguments: Any) -> None:
        model, device = sharded.model, sharded.devices.compute
        self._sharded, self._moment = sharded, sharded.phases.moment
        self._changes = _changes(sharded)
        self._before = Before(model)
        self._reads = Reads(model, self._before.add, self._before.add_place, self._before.alive)
        self._then = self._before.now()
        tensors = [*model.buffers(), *(each for part in model.modules() for _, each in plain_tensors(part))]
        tensors += [each for each in tree_leaves(arguments) if isinstance(each, Tensor)]
        kept = [each for each in tensors if not each.is_inference() and not each.is_meta]
        self._tensors = [(each, torch_internals.num_changes([each]), each.detach().clone()) for each in kept]
        self._restore_generators = restoring_all(device, [*generators_of(model), *tree_leaves(arguments)])

    @contextmanager
    def watching(self) -> Generator[None]:
        """See what of the Python state is read in the block, and so what may change."""
        with self._reads.following():
            yield

    @contextmanager
    def paused(self) -> Generator[None]:
        """See nothing inside of the block."""
        is_seen = self._reads.pause()
        try:
            yield
        finally:
            if is_seen:
                self._reads.go_on()

    def undo(self, written: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Come back to what there was.

        Args:
            written: parameters that were changed: their data, and a copy of it as it was.

        Raises:
            UndoError: other shards, or gradients, were changed.
        """
        now = _changes(self._sharded)
        changed = {fqn for fqn, num_changes in self._changes.items() if now[fqn] != num_changes}
        if self._sharded.phases.moment != self._moment or not changed.issubset(written):
            raise UndoError
        with torch.no_grad(), torch.inference_mode(False):
            for fqn, (data, value) in written.items():
                self._sharded.params[fqn].data = data
                data.copy_(value)
        self._before.go_back_to(self._then)
        self._before.undo_structure()
        with torch.no_grad(), torch.inference_mode(False):
            for tensor, num_changes, value in self._tensors:
                if torch_internals.num_changes([tensor]) != num_changes:
                    tensor.copy_(value)
        self._restore_generators()
