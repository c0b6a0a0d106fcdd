"""Fix the layout of a model, which says what each rank owns, on all ranks alike; move its parameters into shards."""

import warnings
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace

import torch
import torch.distributed as dist

from fxzero import torch_internals
from fxzero.capture.draws import rng_state
from fxzero.comm import agree
from fxzero.comm.groups import Hierarchy
from fxzero.comm.without_ranks import PlanningComm
from fxzero.errors import CheckpointError, FxzeroError, OptimizerError
from fxzero.graph.layout import Layout
from fxzero.module.initialize import check_meta_model, initialize
from fxzero.module.ranks.equal_models import compare_with_equal_models
from fxzero.module.registered_tensors import entries
from fxzero.module.sharded_model import ShardedModel
from fxzero.optimizers.marks import foreign_state, is_marked
from fxzero.optimizers.state import cut_state
from fxzero.planning.agreed_text import describe_buffers, describe_layout, describe_options
from fxzero.planning.fix_layout import layout_in_registration_order
from fxzero.runtime.shards import Shards, install, shard_full_params


def agree_on_options(sharded: ShardedModel) -> None:
    """Compare the options of a model, before anything is exchanged that some of them ask for; a collective.

    Raises:
        RankMismatchError: ranks have different options.
    """
    lines = [f"model: {sharded.phases.name}", *describe_options(sharded.agreed)]
    agree.agree(sharded.group, "layout", lines, timeout=sharded.timeout)


def fix_layout(
    sharded: ShardedModel, layout: Layout, order: Sequence[str] = (), loaded: AbstractSet[str] = frozenset()
) -> None:
    """Give a model its buckets: make the storage for this rank's shards, and fill it; a collective.

    Args:
        order: the collectives of the first plan, which ranks compare too.
        loaded: names of parameters and buffers that a checkpoint is about to fill.

    Raises:
        RankMismatchError: ranks have different layouts or options.
    """
    if sharded.group is None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise FxzeroError(
            "torch.distributed was initialised after fxzero.compile, which took this rank for the only one. Call "
            "init_process_group() first."
        )
    lines = [f"model: {sharded.phases.name}", *describe_layout(layout, sharded.agreed)]
    lines += [f"collective {line}" for line in order]
    lines += [f"mesh: {sharded.group}"] if isinstance(sharded.group, Hierarchy) else []
    lines += describe_buffers(sharded.model)
    for optimizer in sharded.optimizers:
        lines += sharded.phases.describe(optimizer)
    foreign = next(
        filter(None, (foreign_state(each, sharded.held_by(each, layout)) for each in sharded.optimizers)), None
    )
    lines += [foreign or "optimizer state: of this rank"] if sharded.optimizers else []
    agree.agree(sharded.group, "layout", lines, timeout=sharded.timeout)
    if foreign is not None:
        raise OptimizerError(foreign)
    from_rank0 = _only_on_rank0(sharded)
    sharded.phases.is_fixed()
    compare_with_equal_models(sharded, layout)
    with torch.inference_mode(False):  # shards made in it could not be trained
        shards = Shards(layout, sharded.comm.rank, sharded.devices.shards)
        _fill(sharded, shards, loaded, from_rank0)
        sharded.hold(shards)
    others, sharded.family = [other for other in sharded.family if other is not sharded], []
    for other in others:
        other.family, other.recipe = [], sharded.recipe
        fix_layout(other, layout)


def fix_layout_without_trace(sharded: ShardedModel, loaded: AbstractSet[str] = frozenset()) -> None:
    """Fix the layout in registration order, if it is not fixed yet."""
    if sharded.shards is None:
        params = sharded.params
        now = [replace(spec, requires_grad=params[spec.fqn].requires_grad) for spec in sharded.specs.values()]
        layout = layout_in_registration_order(now, sharded.comm.sharding, sharded.recipe, sharded.passes)
        fix_layout(sharded, layout, loaded=loaded)


def _only_on_rank0(sharded: ShardedModel) -> frozenset[str]:
    """The names of parameters and buffers that are on meta here, and have values on rank 0; a collective.

    Raises:
        CheckpointError: a parameter or buffer has values here, and is on meta on rank 0.
    """
    if sharded.comm.is_alone or not sharded.sync_init:
        return frozenset()
    own = [entry.fqn for entry in entries(sharded.model) if entry.tensor.is_meta]
    posts = agree.exchange(sharded.group, "tensors on meta", own, timeout=sharded.timeout)
    for rank, names in enumerate(posts):
        if lacking := sorted({*posts[0]} - {*names}):
            raise CheckpointError(
                f"{lacking[0]} is on the meta device on rank 0, and has values on rank {rank}. Rank 0's values win: "
                "give it values there, build the model on meta on all ranks, or pass sync_init=False."
            )
    return frozenset(own) - frozenset(posts[0])


def _fill(
    sharded: ShardedModel, shards: Shards, loaded: AbstractSet[str], from_rank0: AbstractSet[str] = frozenset()
) -> None:
    """Move the model's parameters into their shards, and initialise those on meta; all ranks take rank 0's values.

    Args:
        loaded: names of parameters and buffers that get memory here, and their values from a checkpoint.
        from_rank0: names of those on meta that rank 0 sends.
    """
    given = loaded | from_rank0
    with_grad = [fqn for fqn, param in sharded.params.items() if param.grad is not None]
    if with_grad:
        warnings.warn(
            f"{with_grad[0]} and {len(with_grad) - 1} more parameters have gradients from before they were sharded, "
            "which are dropped. Step or zero them before the first call.",
            stacklevel=2,
        )
    on_meta = {entry.fqn for entry in entries(sharded.model) if entry.tensor.is_meta}
    if on_meta - from_rank0:
        check_meta_model(sharded.model, sharded.init_fn, given)
        initialize(
            sharded.model,
            device=shards.device,
            init_fn=sharded.init_fn,
            store=shards.store,
            skip=given,
            generator_state=_rng_state_of_rank0(sharded),
        )
    for optimizer in sharded.optimizers:
        parts = sharded.held_by(optimizer, shards.layout)
        if not is_marked(optimizer, parts):  # a marked one has the state of shards, loaded before they were made
            cut_state(optimizer, parts)
    if sharded.sync_init:
        whole = [param for fqn, param in sharded.params.items() if not sharded.specs[fqn].is_cut]
        for tensor in [*whole, *sharded.model.buffers()]:
            sharded.send_to_parts(tensor)
    shard_full_params(shards, sharded.params, sharded.comm, sync_init=sharded.sync_init, from_rank0=from_rank0)
    for module in sharded.model.modules():
        torch_internals.forget_flat_weights(module)
    for fqn, param in sharded.params.items():
        if param.is_meta:
            install(fqn, param, shards.param_view(fqn))
    for entry in (entry for entry in entries(sharded.model) if not entry.is_param):
        if entry.tensor.is_meta:
            assert entry.fqn in given, entry.fqn
            entry.put(torch.empty_like(entry.tensor, device=shards.device))
        elif entry.tensor.device != shards.device:
            entry.put(entry.tensor.to(shards.device))
    if sharded.sync_init:
        for buffer in sharded.model.buffers():
            sharded.comm.broadcast_from_rank0(buffer)


def _rng_state_of_rank0(sharded: ShardedModel) -> torch.Tensor:
    state = rng_state(sharded.devices.compute).to(sharded.devices.compute)
    if not isinstance(sharded.comm, PlanningComm):
        sharded.comm.broadcast_from_rank0(state)
    return state.cpu()
