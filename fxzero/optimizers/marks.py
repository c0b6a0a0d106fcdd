"""Marks in an optimizer's groups that say whose slices its state belongs to; they are saved and loaded with the state.

Shards of two ranks often have equal shapes, so state of one would fit the other. In the state dict of an optimizer a
group has a mark for each compiled model with parameters in it, by the place of the first of them. What is loaded brings
it into the optimizer, where it stays until it was compared.

    {"params": [...], "lr": 0.1, "fxzero_shards_0": "rank 1 of 2, slices 6f1ab8c04d2e"}
"""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist

from fxzero.optimizers.state import ParamShard, name_of

PREFIX = "fxzero_shards_"


def marks_of(group: Mapping[str, Any], shards: Mapping[int, ParamShard]) -> dict[str, str]:
    """The mark of this rank's shards that the state dict of a group has, by its key; empty without such parameters."""
    held = [(place, shards[id(param)]) for place, param in enumerate(group["params"]) if id(param) in shards]
    if not held:
        return {}
    slices = [(shard.spec.fqn, shard.part.start, shard.part.stop) for _, shard in held]
    digest = hashlib.sha256(repr(slices).encode()).hexdigest()[:12]
    return {f"{PREFIX}{held[0][0]}": f"{_this_rank()}, slices {digest}"}


def unmark(optimizer: torch.optim.Optimizer, shards: Mapping[int, ParamShard]) -> None:
    """Forget the marks that were loaded: the state is that of this rank's shards."""
    for group, key, _ in _marks(optimizer, shards):
        group.pop(key, None)


def is_marked(optimizer: torch.optim.Optimizer, shards: Mapping[int, ParamShard]) -> bool:
    """True if the state is that of shards already, of any rank."""
    return any(key in group for group, key, _ in _marks(optimizer, shards))


def foreign_state(optimizer: torch.optim.Optimizer, shards: Mapping[int, ParamShard]) -> str | None:
    """The text of an error if the state is that of other slices than this rank's; else None."""
    for group, key, own in _marks(optimizer, shards):
        found = group.get(key, own)
        if _slices(found) != _slices(own):
            return (
                f"The state that was loaded into {name_of(optimizer)} is that of {found}; the shards here are those of "
                f"{own}. Save optimizer.state_dict() on every rank, and load on each rank its own, with the same "
                "number of ranks and the same buckets."
            )
    return None


def _marks(
    optimizer: torch.optim.Optimizer, shards: Mapping[int, ParamShard]
) -> Iterator[tuple[dict[str, Any], str, str]]:
    """Each group with parameters among these, the key of its mark, and the mark that it must have here."""
    for group in optimizer.param_groups:
        yield from ((group, key, text) for key, text in marks_of(group, shards).items())


def _this_rank() -> str:
    if dist.is_available() and dist.is_initialized():
        return f"rank {dist.get_rank()} of {dist.get_world_size()}"
    return "rank 0 of 1"


def _slices(text: object) -> str:
    return str(text).rpartition(" ")[2]
