"""Weights in and out of the shards: the first fill, full state dicts, and loading them. All are collectives."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fxzero import torch_internals
from fxzero.comm import agree
from fxzero.comm.without_ranks import PlanningComm
from fxzero.errors import CheckpointError
from fxzero.module.initialize import check_meta_model, initialize, rng_state
from fxzero.module.optimizer_state import ParamShard, cut_state
from fxzero.module.registered_tensors import join
from fxzero.planning.agreed_text import describe_options, describe_params
from fxzero.runtime.interleave import gathered_members
from fxzero.runtime.shards import Shards, install, shard_full_params

if TYPE_CHECKING:
    from fxzero.module.engine import Engine


def fill_shards(engine: Engine, shards: Shards, loaded: AbstractSet[str]) -> None:
    """Move the model's parameters into their shards, initialising those on meta; rank 0's values win.

    Args:
        loaded: names that a checkpoint is about to fill: they get shards and buffers, but no values.
    """
    with_grad = [fqn for fqn, param in engine.params.items() if param.grad is not None]
    if with_grad:
        warnings.warn(
            f"{with_grad[0]} and {len(with_grad) - 1} more parameters have gradients from before they were sharded, "
            "which are dropped. Step or zero them before the first call.",
            stacklevel=2,
        )
    if any(tensor.is_meta for tensor in [*engine.params.values(), *engine.model.buffers()]):
        check_meta_model(engine.model, engine.options.init_fn, loaded)
        initialize(
            engine.model,
            device=shards.device,
            init_fn=engine.options.init_fn,
            store=shards.store,
            skip=loaded,
            generator_state=_rng_state_of_rank0(engine),
        )
    for optimizer in engine.optimizers:
        cut_state(optimizer, param_shards(engine, shards))
    shard_full_params(shards, engine.params, engine.comm, sync_init=engine.options.sync_init)
    for module in engine.model.modules():
        torch_internals.forget_flat_weights(module)
    for fqn, param in engine.params.items():
        if param.is_meta:
            install(fqn, param, shards.param_view(fqn))
    for fqn, buffer in engine.named_buffers():
        if buffer.is_meta:
            assert fqn in loaded, fqn
            engine.set_buffer(fqn, torch.empty_like(buffer, device=shards.device))
        elif buffer.device != shards.device:
            engine.set_buffer(fqn, buffer.to(shards.device))
    if engine.options.sync_init:
        for _, buffer in engine.named_buffers():
            engine.comm.broadcast_from_rank0(buffer)


def param_shards(engine: Engine, shards: Shards) -> dict[int, ParamShard]:
    """What this rank holds of each parameter, by the id of the Parameter object."""
    held: dict[int, ParamShard] = {}
    for bucket in shards.layout.buckets:
        for spec in bucket.params:
            part = bucket.slice_of(spec, engine.comm.rank)
            held[id(engine.params[spec.fqn])] = ParamShard(spec, part, shards.device)
    return held


def _rng_state_of_rank0(engine: Engine) -> torch.Tensor:
    state = rng_state(engine.options.device).to(engine.options.device)
    if isinstance(engine.comm, PlanningComm):
        return state.cpu()
    engine.comm.broadcast_from_rank0(state)
    return state.cpu()


def full_params(engine: Engine, *, rank0_only: bool) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Gather the parameters bucket by bucket: `(name, full tensor)`, None on other ranks if `rank0_only`.

    A tensor is a view of memory that the next bucket overwrites: copy what you keep. Every rank must iterate to the
    end.
    """
    assert engine.shards is not None
    shards, comm = engine.shards, engine.comm
    largest = max((bucket.shard_ranks * bucket.shard_nbytes for bucket in shards.layout.buckets), default=0)
    room = torch.empty(0, dtype=torch.uint8, device=shards.device)
    if comm.is_rank0 or not rank0_only:
        room = torch.empty(largest, dtype=torch.uint8, device=shards.device)
    for bucket in shards.layout.buckets:
        shard = shards.params.parts[bucket]
        if rank0_only and not comm.is_rank0:
            comm.gather_to_rank0(shard, None)
            yield from ((fqn, None) for fqn in bucket.fqns)
            continue
        full = room[: bucket.shard_ranks * bucket.shard_nbytes].view(bucket.dtypes.shard)
        if rank0_only:
            comm.gather_to_rank0(shard, full)
        else:
            comm.gather_to_all(shard, full)
        yield from gathered_members(bucket, full)


def state_dict(
    engine: Engine, *, rank0_only: bool, prefix: str = "", destination: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The full state dict, with the model's own names; tied parameters share one tensor. See ZeroModule.state_dict."""
    keep = engine.comm.is_rank0 or not rank0_only
    full = _full_copies(engine, rank0_only=rank0_only)
    names = {id(param): fqn for fqn, param in engine.params.items()}
    local = nn.Module.state_dict(engine.model, prefix=prefix, keep_vars=True)
    result: dict[str, Any] = OrderedDict() if destination is None else destination
    for name, value in local.items():
        if id(value) in names:
            copy = full.get(names[id(value)])
        else:
            copy = value.detach().clone() if isinstance(value, torch.Tensor) else value
            if isinstance(copy, torch.Tensor) and not rank0_only and _has_rank0(engine):
                engine.comm.broadcast_from_rank0(copy)
        if keep:
            result[name] = copy
    torch_internals.add_metadata(result, local)
    return result


def _has_rank0(engine: Engine) -> bool:
    """False where this rank's own values count: before the layout is fixed, if the user says that all are equal."""
    return engine.shards is not None or engine.options.sync_init


def _full_copies(engine: Engine, *, rank0_only: bool) -> dict[str, torch.Tensor]:
    """A copy of each parameter, at full size, by canonical name; empty on other ranks if `rank0_only`."""
    if engine.shards is None and not engine.has_meta_params():  # nothing is sharded yet
        if rank0_only:
            params = engine.params if engine.comm.is_rank0 else {}
            return {fqn: param.detach().clone() for fqn, param in params.items()}
        lines = describe_options(engine.options.agreed()) + describe_params(engine.specs.values())
        agree.agree(engine.group, "state dict", lines, timeout=engine.options.timeout)
        copies = {fqn: param.detach().clone() for fqn, param in engine.params.items()}
        if _has_rank0(engine):
            for copy in copies.values():
                engine.comm.broadcast_from_rank0(copy)
        return copies
    engine.fix_layout_without_trace()
    return {fqn: value.clone() for fqn, value in full_params(engine, rank0_only=rank0_only) if value is not None}


def load_state_dict(engine: Engine, state: Mapping[str, Any], *, strict: bool) -> Any:
    """Load a full state dict that every rank has; each keeps its slices. See ZeroModule.load_state_dict."""
    state, names, extra = dict(state), _names(engine), _extra_states(engine)
    missing, unexpected = _run_load_hooks(engine, state)
    given = {names[name] for name in state if name in names}
    missing += [name for name, fqn in names.items() if name not in state and fqn not in given]
    missing += [name for name in extra if name not in state]
    unexpected += [name for name in state if name not in names and name not in extra]
    if strict and (missing or unexpected):
        raise CheckpointError(
            f"The state dict does not fit: missing {missing or 'nothing'}, unexpected {unexpected or 'nothing'}. Pass "
            "strict=False to load what fits."
        )
    tensors = {name: value for name, value in state.items() if name in names}
    _check_tensors(engine, tensors, names)
    if engine.has_meta_params():
        engine.fix_layout_without_trace(loaded=given)
    shards, buffers = engine.shards, dict(engine.named_buffers())
    with torch.no_grad():
        for name, value in tensors.items():
            fqn = names[name]
            if fqn not in engine.params:
                buffers[fqn].copy_(value)
            elif shards is None:
                engine.params[fqn].copy_(value)
            else:
                engine.params[fqn].copy_(shards.cut(fqn, value))
    for name, module in extra.items():
        if name in state:
            module.set_extra_state(state[name])
    return torch_internals.incompatible_keys(missing, unexpected)


def _names(engine: Engine) -> dict[str, str]:
    """Every name of a tensor in a state dict, to the canonical name of its parameter or buffer."""
    canonical = {id(tensor): fqn for fqn, tensor in [*engine.params.items(), *engine.named_buffers()]}
    local = nn.Module.state_dict(engine.model, keep_vars=True)
    return {name: canonical[id(value)] for name, value in local.items() if id(value) in canonical}


def _extra_states(engine: Engine) -> dict[str, nn.Module]:
    """The modules that put something of their own into a state dict, by its name there."""
    return {
        join(path, torch_internals.EXTRA_STATE): module
        for path, module in engine.model.named_modules()
        if type(module).get_extra_state is not nn.Module.get_extra_state
    }


def _run_load_hooks(engine: Engine, state: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Let the model's modules rename and convert what they read from older state dicts; missing, unexpected."""
    missing, unexpected, errors = list[str](), list[str](), list[str]()
    for path, module in engine.model.named_modules():
        for hook in torch_internals.load_hooks(module):
            hook(state, f"{path}." if path else "", {}, True, missing, unexpected, errors)
    if errors:
        raise CheckpointError(f"The state dict does not fit: {'; '.join(errors)}")
    return missing, unexpected


def _check_tensors(engine: Engine, tensors: Mapping[str, Any], names: Mapping[str, str]) -> None:
    buffers = dict(engine.named_buffers())
    for name, value in tensors.items():
        fqn = names[name]
        wanted = engine.specs[fqn].shape if fqn in engine.specs else tuple(buffers[fqn].shape)
        if not isinstance(value, torch.Tensor) or tuple(value.shape) != wanted:
            found = tuple(value.shape) if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
            raise CheckpointError(f"{name} is {found} in the state dict and {wanted} in the model. Load a full one.")
        if value.is_meta:
            raise CheckpointError(f"{name} is on the meta device in the state dict: it has no values.")
