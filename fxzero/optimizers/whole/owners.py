"""Which rank owns which parameter of an optimizer that steps whole ones.

The owner is the rank that has the most of the parameter in its shard, so that the least must travel, unless it would
then have too much to do. What a rank has to do is counted in elements, of which its share of the state follows too.

shards     rank 0 [ w1 .... | w2 ..       rank 1  .. | w3 ... | w4 .. ]
owners            w1, w2 (a part travels)         w3, w4

Groups are looked at in order, so that one that is added later changes no owner.
"""

import weakref
from collections.abc import Mapping, Sequence

import torch

from fxzero.graph.layout import Layout, ParamSpec, Slice
from fxzero.optimizers.state import ParamShard, parameters_of

_SLACK = 1.125
"""Elements of a rank over the mean of all ranks up to which it takes what it has the most of."""
Ranges = tuple[tuple[int, int], ...]
"""Start and stop of each rank's slice of a flattened parameter."""


def ranges_of(layout: Layout, spec: ParamSpec) -> Ranges:
    """Start and stop of each rank's slice of a parameter."""
    bucket = layout.bucket_of[spec.fqn]
    parts = [bucket.slice_of(spec, rank) for rank in range(bucket.shard_ranks)]
    return tuple((part.start, part.stop) for part in parts)


def choose_owners(sizes: Sequence[tuple[int, Ranges]], loads: list[int]) -> list[int]:
    """The owner of each parameter of a group.

    Args:
        sizes: the elements of each parameter, and what each rank has of it.
        loads: the elements that each rank owns already; those of this group are added.
    """
    owners = [0] * len(sizes)
    limit = _SLACK * (sum(loads) + sum(numel for numel, _ in sizes)) / len(loads)
    held = [[stop - start for start, stop in ranges] for _, ranges in sizes]
    in_parts = [max(each) < numel for each, (numel, _) in zip(held, sizes, strict=True)]
    for index in sorted(range(len(sizes)), key=lambda i: (in_parts[i], -sizes[i][0], i)):
        numel = sizes[index][0]
        fitting = [rank for rank, load in enumerate(loads) if load + numel <= limit]
        if fitting:
            owner = max(fitting, key=lambda rank: (held[index][rank], -loads[rank], -rank))
        else:
            owner = min(range(len(loads)), key=lambda rank: (loads[rank], -held[index][rank], rank))
        owners[index] = owner
        loads[owner] += numel
    return owners


_chosen: weakref.WeakKeyDictionary[torch.optim.Optimizer, dict[int, tuple[Layout, dict[int, int]]]]
_chosen = weakref.WeakKeyDictionary()
"""The owners chosen so far for the parameters of an optimizer, by the id of the layout, with that."""


def owners_of(optimizer: torch.optim.Optimizer, shards: Mapping[int, ParamShard], layout: Layout) -> dict[int, int]:
    """Maps the id of each parameter with these ids that an optimizer steps to the rank that owns it."""
    _, owners = _chosen.setdefault(optimizer, {}).setdefault(id(layout), (layout, {}))
    loads = [0] * layout.shard_ranks
    for key, owner in owners.items():
        loads[owner] += shards[key].spec.numel
    for group in optimizer.param_groups:
        new = [id(param) for param in group["params"] if id(param) in shards and id(param) not in owners]
        specs = [shards[key].spec for key in new]
        chosen = choose_owners([(spec.numel, ranges_of(layout, spec)) for spec in specs], loads)
        owners.update(zip(new, chosen, strict=True))
    return {id(param): owners[id(param)] for _, param in parameters_of(optimizer, shards)}


def owned_shards(
    optimizer: torch.optim.Optimizer, shards: Mapping[int, ParamShard], layout: Layout, rank: int
) -> dict[int, ParamShard]:
    """What a rank has of the state of each parameter that an optimizer steps: all, or nothing."""
    owned: dict[int, ParamShard] = {}
    for key, owner in owners_of(optimizer, shards, layout).items():
        spec = shards[key].spec
        owned[key] = ParamShard(spec, Slice(0, spec.numel * (owner == rank), 0), shards[key].device, owner)
    return owned
