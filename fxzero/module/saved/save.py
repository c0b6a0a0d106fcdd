"""Write a checkpoint: every rank its slices, rank 0 the manifest, and a rename once all of it is on the disk."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from fxzero.checkpoint.files import complete, new_folder, remove_old, sync_folder, write_rank
from fxzero.checkpoint.values import encode, name_of_dtype
from fxzero.comm import agree
from fxzero.comm.groups import Hierarchy
from fxzero.errors import CheckpointError
from fxzero.module.engine import Engine
from fxzero.module.first_fill import fix_layout_without_trace
from fxzero.module.saved.parts import (
    TOPIC,
    Optimizers,
    OptimizerState,
    buffers,
    extra_states,
    further_names,
    position,
    random_states,
    tensors_of,
)
from fxzero.module.sharded_model import ShardedModel
from fxzero.optimizers import made_up
from fxzero.optimizers.state import name_of


def save(engine: Engine, root: Path, optimizers: Optimizers, extra: Any, keep: int | None) -> Path:
    """Write a checkpoint into a new folder of `root`; a collective. See `fxzero.save`."""
    sharded = engine.sharded
    group, timeout, is_first = sharded.group, sharded.timeout, position(sharded.group) == 0
    with sharded.phases.phase("save"):
        fix_layout_without_trace(sharded)
        with agree.reporting_failure(group, TOPIC):
            own = {"extra": encode(extra, "extra"), "random": encode(random_states(sharded.devices.compute), "random")}
            states = [OptimizerState(number, each, sharded.held_by(each)) for number, each in enumerate(optimizers)]
            _refuse_made_up(optimizers)
        for state in states:
            state.complete(partial(agree.exchange_made, group, TOPIC, timeout=timeout))
        with agree.reporting_failure(group, TOPIC):
            described = [state.described() for state in states]
            folder = Path(new_folder(root)) if is_first else root
        folder = Path(agree.exchange(group, TOPIC, [str(folder)], timeout=timeout)[0][0])
        with agree.reporting_failure(group, TOPIC):
            crc32 = write_rank(folder, position(group), _parts(sharded, states), own)
            sync_folder(folder)
        written = agree.exchange(group, TOPIC, [str(crc32)], timeout=timeout)
        with agree.reporting_failure(group, TOPIC):
            if is_first:
                facts = {"optimizers": described, "indices": [int(line) for (line,) in written]}
                folder = complete(folder, _manifest(engine, states) | facts)
                if keep is not None:
                    remove_old(root, keep)
        return Path(agree.exchange(group, TOPIC, [str(folder)], timeout=timeout)[0][0])


def _refuse_made_up(optimizers: Optimizers) -> None:
    for optimizer in optimizers:
        if made_up.is_unusable(optimizer):
            raise CheckpointError(
                f"{name_of(optimizer)} has not stepped yet, and torch.distributed.checkpoint made it have a state. "
                "Save after the first step."
            )


def _parts(sharded: ShardedModel, states: Sequence[OptimizerState]) -> Iterator[tuple[str, int, Tensor]]:
    """The slices of this rank, with their first element in the whole; on rank 0 also the buffers."""
    sharded.replaced()  # refuses data of other shapes
    group, shards = sharded.group, sharded.held_shards()
    if isinstance(group, Hierarchy) and not group.shards_across and group.across.rank():
        return  # node 0 has the same slices
    for fqn, param in sharded.params.items():
        yield f"model/{fqn}", shards[id(param)].part.start, param.detach().view(-1)
    if position(group) == 0:
        yield from ((f"buffer/{fqn}", 0, buffer.reshape(-1)) for fqn, buffer in buffers(sharded).items())
    for state in states:
        yield from ((name, shard.part.start, value.view(-1)) for name, (shard, value) in state.slices.items())


def _manifest(engine: Engine, states: Sequence[OptimizerState]) -> dict[str, Any]:
    sharded, cluster = engine.sharded, engine.maker.tuning.cluster
    assert sharded.shards is not None
    extra = extra_states(sharded.model)
    return {
        "tensors": {n: [name_of_dtype(dtype), list(shape)] for n, dtype, shape in tensors_of(sharded, states)},
        "further_names": further_names(sharded),
        "extra_states": {
            path: encode(module.get_extra_state(), f"extra state of {path}") for path, module in extra.items()
        },
        "buckets": [list(bucket.fqns) for bucket in sharded.shards.layout.buckets],
        "shard_ranks": sharded.comm.shard_ranks,
        "layout": sharded.recipe.layout,
        "cluster": None if cluster is None else cluster.numbers(),
    }
