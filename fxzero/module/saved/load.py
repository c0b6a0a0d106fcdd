"""Read a checkpoint at any number of ranks; it is taken in only when all ranks have read without an error."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxzero import torch_internals
from fxzero.checkpoint.files import Saved, newest
from fxzero.checkpoint.values import decode
from fxzero.comm import agree
from fxzero.cost.model import Cluster
from fxzero.errors import CheckpointError
from fxzero.graph.layout import Bucket, Layout, make_bucket
from fxzero.module.engine import Engine
from fxzero.module.first_fill import fix_layout, fix_layout_without_trace
from fxzero.module.saved.parts import (
    TOPIC,
    Optimizers,
    OptimizerState,
    buffers,
    extra_states,
    num_positions,
    position,
    refuse_parts,
    set_random_states,
)
from fxzero.module.sharded_model import ShardedModel
from fxzero.optimizers.guard import hook_state_dicts
from fxzero.optimizers.marks import marks_of
from fxzero.optimizers.state import ParamShard, name_of
from fxzero.optimizers.whole.state import has_state
from fxzero.optimizers.whole.wrapped import Inside, put_together

logger = logging.getLogger(__name__)


def find(engine: Engine, path: Path) -> Path | None:
    """The checkpoint that a path means on rank 0, for all ranks; None if there is none. A collective."""
    sharded = engine.sharded
    with agree.reporting_failure(sharded.group, TOPIC):
        found = newest(path)
    posts = agree.exchange(sharded.group, TOPIC, [str(found or "")], timeout=sharded.timeout)
    return Path(posts[0][0]) if posts[0][0] else None


def load(engine: Engine, path: Path, optimizers: Optimizers) -> Any:
    """Take in a checkpoint; a collective. See `fxzero.load`."""
    with engine.sharded.phases.phase("load"):
        found = find(engine, path)
    if found is None:
        raise CheckpointError(f"There is no checkpoint in {path}.")
    return _load(engine, found, optimizers)


def load_newest(engine: Engine, path: Path, optimizers: Optimizers) -> Any:
    """Take in the newest checkpoint if there is one; a collective. Returns its extra, or None."""
    with engine.sharded.phases.phase("load"):
        found = find(engine, path)
    if found is None:
        logger.info("there is no checkpoint in %s yet: training begins", path)
        return None
    extra = _load(engine, found, optimizers)
    logger.info("training goes on from %s", found)
    return extra


def _load(engine: Engine, found: Path, optimizers: Optimizers) -> Any:
    sharded = engine.sharded
    refuse_parts(sharded)
    with sharded.phases.phase("load"), ExitStack() as stack:
        with agree.reporting_failure(sharded.group, TOPIC):
            saved = stack.enter_context(closing(Saved(found)))
            _check_tensors(sharded, saved)
        if sharded.shards is None:
            _fix_layout_as(engine, saved)
        with agree.reporting_failure(sharded.group, TOPIC):
            tensors = _read(sharded, saved)
            states = [_read_state(saved, number, each, sharded.held_by(each)) for number, each in enumerate(optimizers)]
            saved.finish_reads()
        agree.agree(sharded.group, TOPIC, [f"read {found}"], timeout=sharded.timeout)
        _take_in(sharded, saved, tensors)
        for number, (optimizer, state) in enumerate(zip(optimizers, states, strict=True)):
            hook_state_dicts(optimizer)
            if _has_tensors_inside(saved, number) and not has_state(optimizer):
                torch_internals.make_optimizer_state(optimizer)
            optimizer.load_state_dict(state | {"state": put_together(optimizer, state["state"])})
        return _own_values(engine, saved)


def _has_tensors_inside(saved: Saved, number: int) -> bool:
    """True if an optimizer had state in tensors of a class of its own."""
    states: Mapping[str, Mapping[str, Any]] = saved.manifest["optimizers"][number]["state"]
    return any(isinstance(value, dict) for values in states.values() for value in values.values())


def _check_tensors(sharded: ShardedModel, saved: Saved) -> None:
    wanted = {f"model/{fqn}": spec.shape for fqn, spec in sharded.specs.items()}
    wanted |= {f"buffer/{fqn}": tuple(buffer.shape) for fqn, buffer in buffers(sharded).items()}
    found = {name: shape for name, shape in saved.shapes.items() if not name.startswith("optim/")}
    missing, unexpected = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing or unexpected:
        raise CheckpointError(
            f"{saved.folder} is of another model: missing {missing[:5] or 'nothing'}, unexpected "
            f"{unexpected[:5] or 'nothing'}."
        )
    for name, shape in wanted.items():
        if found[name] != shape:
            raise CheckpointError(f"{name} is {found[name]} in {saved.folder} and {shape} in the model.")


# -- the layout ----------------------------------------------------------------------------------------------------


def _fix_layout_as(engine: Engine, saved: Saved) -> None:
    """Fix the layout with the buckets of a checkpoint, and the costs from which they were chosen."""
    sharded, numbers = engine.sharded, saved.manifest["cluster"]
    if engine.maker.tuning.cluster is None and numbers is not None:
        engine.maker.tuning.cluster = Cluster.of_numbers(numbers)
    given = frozenset([*sharded.params, *buffers(sharded)])
    layout = _layout_of(sharded, saved)
    if layout is None:
        logger.info("the buckets of %s do not fit: other parameters are trained, or have other dtypes", saved.folder)
        fix_layout_without_trace(sharded, loaded=given)
    else:
        fix_layout(sharded, layout, loaded=given)


def _layout_of(sharded: ShardedModel, saved: Saved) -> Layout | None:
    now = {fqn: replace(spec, requires_grad=sharded.params[fqn].requires_grad) for fqn, spec in sharded.specs.items()}
    groups = [[now[fqn] for fqn in fqns] for fqns in saved.manifest["buckets"]]
    if any(len({spec.bucket_key for spec in group}) > 1 for group in groups):
        return None
    ranks = sharded.comm.shard_ranks
    return Layout(tuple(make_bucket(group, ranks, sharded.recipe.layout) for group in groups), ranks)


def _is_as_saved(buckets: Sequence[Bucket], ranks: int, layout: str, manifest: Mapping[str, Any]) -> bool:
    own = [list(bucket.fqns) for bucket in buckets]
    return (own, ranks, layout) == (manifest["buckets"], manifest["shard_ranks"], manifest["layout"])


# -- tensors -------------------------------------------------------------------------------------------------------


def _read(sharded: ShardedModel, saved: Saved) -> dict[str, Tensor]:
    """What this rank will hold, flat, by the name of the parameter or buffer; there after `finish_reads`."""
    read: dict[str, Tensor] = {}
    shards = sharded.held_shards()
    for fqn, param in sharded.params.items():
        part = shards[id(param)].part
        read[fqn] = saved.begin_read(f"model/{fqn}", part.start, part.stop)
    for fqn in buffers(sharded):
        read[fqn] = saved.begin_read(f"buffer/{fqn}")
    return read


def _take_in(sharded: ShardedModel, saved: Saved, tensors: Mapping[str, Tensor]) -> None:
    targets = {**sharded.params, **buffers(sharded)}
    with torch.no_grad():
        for fqn, value in tensors.items():
            targets[fqn].copy_(value.view(targets[fqn].shape))
    for path, module in extra_states(sharded.model).items():
        if path in saved.manifest["extra_states"]:
            module.set_extra_state(decode(saved.manifest["extra_states"][path]))


def _read_state(
    saved: Saved, number: int, optimizer: torch.optim.Optimizer, shards: dict[int, ParamShard]
) -> dict[str, Any]:
    """A state dict of this rank's slices for an optimizer, of which those on the CPU are there after `finish_reads`."""
    described = saved.manifest["optimizers"]
    if number >= len(described):
        raise CheckpointError(f"{saved.folder} has the state of {len(described)} optimizers; {number + 1} were given.")
    facts, own = described[number], OptimizerState(number, optimizer, shards)
    _check_groups(saved, own, facts)
    state: dict[int, dict[str, Any]] = {}
    for index, shard in enumerate(shard for group in own.groups for shard in group):
        values: Mapping[str, Any] | None = facts["state"].get(shard.spec.fqn)
        if values is not None and shard.is_stepped:
            state[index] = {key: _value(saved, own, shard, key, value) for key, value in values.items()}
    options = [{key: decode(value) for key, value in group.items()} for group in facts["options"]]
    counts = iter(range(sum(map(len, own.groups))))
    groups = [
        {**each, **marks_of(group, shards), "params": [next(counts) for _ in group["params"]]}
        for each, group in zip(options, optimizer.param_groups, strict=True)
    ]
    return {"state": state, "param_groups": groups}


def _value(saved: Saved, own: OptimizerState, shard: ParamShard, key: str, value: Any) -> Any:
    if isinstance(value, dict):
        parts: Mapping[str, Any] = value
        return Inside({name: _value(saved, own, shard, f"{key}.{name}", each) for name, each in parts.items()})
    if value is not None:
        return decode(value[0])
    name = own.tensor(key, shard.spec.fqn)
    shape = saved.shape_of(name)
    read = saved.begin_read if shard.device.type == "cpu" else saved.read
    if shard.owner is not None:
        return read(name).view(shape).to(shard.device)
    if shape != shard.spec.shape:
        raise CheckpointError(f"{name} is {shape} in {saved.folder}; its parameter is {shard.spec.shape}.")
    return read(name, shard.part.start, shard.part.stop).view(shard.shape).to(shard.device)


def _check_groups(saved: Saved, own: OptimizerState, facts: Mapping[str, Any]) -> None:
    kind = name_of(own.optimizer)
    if facts["class"] != kind:
        raise CheckpointError(f"Optimizer {own.number} was a {facts['class']} in {saved.folder}, and is a {kind}.")
    now = [[shard.spec.fqn for shard in group] for group in own.groups]
    if now != facts["params"]:
        pairs = zip([*now, []], [*facts["params"], []], strict=False)
        number, differing = next((n, sorted({*a} ^ {*b})) for n, (a, b) in enumerate(pairs) if a != b)
        raise CheckpointError(
            f"Group {number} of {kind} has other parameters, or in another order, than in {saved.folder}: "
            f"{', '.join(differing[:5]) or 'the order'}. Build the optimizer as in the run that saved."
        )


# -- what is not tensors -------------------------------------------------------------------------------------------


def _own_values(engine: Engine, saved: Saved) -> Any:
    """Restore the random states of this rank, and return what it saved as `extra`; at another number of ranks that of
    rank 0."""
    sharded, shards = engine.sharded, engine.sharded.shards
    assert shards is not None
    own = position(sharded.group)
    is_same_number = num_positions(sharded.group) == len(saved.values)
    if is_same_number:
        set_random_states(decode(saved.values[own]["random"]), sharded.devices.compute)
    ranks, layout = sharded.comm.shard_ranks, sharded.recipe.layout
    if not is_same_number or not _is_as_saved(shards.layout.buckets, ranks, layout, saved.manifest):
        logger.info(
            "%s was saved by %d ranks in %d buckets; its pieces were cut anew for %d ranks and %d buckets, so that "
            "training goes on with other roundings%s",
            *(saved.folder, len(saved.values), len(saved.manifest["buckets"])),
            *(num_positions(sharded.group), len(shards.layout.buckets)),
            "" if is_same_number else " and other random numbers",
        )
    return decode(saved.values[own if is_same_number else 0]["extra"])
