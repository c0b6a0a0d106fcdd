"""Tensors that the user put in the place of shards: `param.data = other`, `torch.utils.swap_tensors(param, other)`.

In plain PyTorch the model then computes with the other tensor, and whoever kept the old data has the old values:

    backup = param.data; param.data = averaged; evaluate(); param.data = backup

Here the old data is the memory of the shard, from which collectives send. So the other tensors are copied there while a
phase runs, and afterwards the memory gets its own values back: outside of phases `backup` is what it was.
"""

from collections.abc import Collection, Generator, Mapping
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor, nn

from fxzero.errors import FxzeroError
from fxzero.runtime.shards import Shards

Replaced: TypeAlias = list[tuple[Tensor, Tensor]]
"""Shards whose place another tensor has taken, each with that tensor."""


class ReplacedData:
    """Finds the parameters of one model whose data is not their shard.

    Args:
        params: the parameters by name; their data is their shard.
    """

    def __init__(self, params: Mapping[str, nn.Parameter], shards: Shards) -> None:
        self._params, self._shards = params, shards
        # An empty tensor has no address; an empty shard is known by its offset in the buffer, which is never 0.
        self._held = [param for param in params.values() if param.numel()]
        self._empty = [param for param in params.values() if not param.numel()]
        self._addresses, self._offsets = self._places()

    def _places(self) -> tuple[list[int], list[int]]:
        return [*map(Tensor.data_ptr, self._held)], [*map(Tensor.storage_offset, self._empty)]  # type: ignore[list-item]

    def find(self, whole: Collection[str] = ()) -> Replaced:
        """The parameters of which other data must be used now; empty in a usual step.

        Args:
            whole: names of parameters that are gathered, and so are not looked at.

        Raises:
            FxzeroError: the data has another shape, dtype or device than the shard.
        """
        held, empty = self._places()
        if held == self._addresses and empty == self._offsets:
            return []
        places = dict(zip(map(id, self._held), zip(held, self._addresses, strict=True), strict=True))
        places |= dict(zip(map(id, self._empty), zip(empty, self._offsets, strict=True), strict=True))
        shown = ((fqn, param) for fqn, param in self._params.items() if fqn not in whole)
        changed = [fqn for fqn, param in shown if len({*places[id(param)]}) > 1]
        return [self._pair(fqn) for fqn in changed]

    def _pair(self, fqn: str) -> tuple[Tensor, Tensor]:
        data, shard = self._params[fqn].data, self._shards.param_view(fqn)
        if (data.shape, data.dtype, data.device) != (shard.shape, shard.dtype, shard.device):
            raise FxzeroError(
                f"The data of {fqn} was replaced by {data.dtype} {tuple(data.shape)} on {data.device} (param.data = "
                f"...); its shard here is {shard.dtype} {tuple(shard.shape)}. Load full weights with load_state_dict()."
            )
        return shard, data


@contextmanager
def in_shards(replaced: Replaced) -> Generator[None]:
    """Let the memory of the shards have the values of the tensors that replace them inside of the block."""
    with torch.no_grad():
        own = [shard.clone() for shard, _ in replaced]
        others = [data.clone() for _, data in replaced]  # one may be the memory of another shard
        _copy(replaced, others)
    try:
        yield
    finally:
        with torch.no_grad():
            _copy(replaced, own)


def _copy(replaced: Replaced, values: list[Tensor]) -> None:
    for (shard, _), value in zip(replaced, values, strict=True):
        shard.copy_(value)
