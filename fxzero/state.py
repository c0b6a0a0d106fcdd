"""Weights in and out of the shards: the first fill, full state dicts, and loading them. All are collectives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fxzero import compat
from fxzero.comm import PlanningComm
from fxzero.errors import CheckpointError
from fxzero.materialize import check_meta_model, initialize, rng_state
from fxzero.optim import ParamShard, cut_state
from fxzero.shards import Shards, install, shard_full_params, unflatten

if TYPE_CHECKING:
    from fxzero.engine import Engine


def fill_shards(engine: Engine, shards: Shards, loaded: AbstractSet[str]) -> None:
    """Move the model's parameters into their shards, initialising those on meta; rank 0's values win.

    Args:
        loaded: names that a checkpoint is about to fill: they get shards and buffers, but no values.
    """
    for optimizer in engine.optimizers:
        cut_state(optimizer, param_shards(engine, shards))
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
    shard_full_params(shards, engine.params, engine.comm, sync_init=engine.options.sync_init)
    for fqn, param in engine.params.items():
        if param.is_meta:
            install(param, shards.param_view(fqn))
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

    A tensor is a view of memory that the next bucket overwrites: copy what you keep. Every rank must iterate to the end.
    """
    assert engine.shards is not None
    shards, comm = engine.shards, engine.comm
    largest = max((bucket.nbytes for bucket in shards.layout.buckets), default=0)
    room = torch.empty(0, dtype=torch.uint8, device=shards.device)
    if comm.rank == 0 or not rank0_only:
        room = torch.empty(largest, dtype=torch.uint8, device=shards.device)
    for bucket in shards.layout.buckets:
        shard = shards.params.parts[bucket]
        if comm.rank != 0 and rank0_only:
            comm.gather_to_rank0(shard, None)
            yield from ((fqn, None) for fqn in bucket.fqns)
            continue
        full = room[: bucket.nbytes].view(bucket.dtype)
        if rank0_only:
            comm.gather_to_rank0(shard, full)
        else:
            comm.gather_to_all(shard, full)
        yield from unflatten(bucket, full).items()


def state_dict(engine: Engine, *, rank0_only: bool, prefix: str = "") -> dict[str, Any]:
    """The full state dict, with the model's own names; tied parameters share one tensor. See ZeroModule.state_dict."""
    if engine.shards is None and not engine.has_meta_params():
        return {f"{prefix}{name}": _copied(value) for name, value in nn.Module.state_dict(engine.model).items()}
    engine.fix_layout_without_trace()
    keep = engine.comm.rank == 0 or not rank0_only
    full = {fqn: value.clone() for fqn, value in full_params(engine, rank0_only=rank0_only) if value is not None}
    canonical = {id(param): fqn for fqn, param in engine.params.items()}
    aliases = {
        name: canonical[id(param)] for name, param in engine.model.named_parameters(remove_duplicate=False)
    }
    result: dict[str, Any] = {}
    for name, value in nn.Module.state_dict(engine.model).items():
        if name in aliases:
            if keep:
                result[f"{prefix}{name}"] = full[aliases[name]]
        else:
            kept = _copied(value)
            if isinstance(kept, torch.Tensor) and not rank0_only:
                engine.comm.broadcast_from_rank0(kept)
            if keep:
                result[f"{prefix}{name}"] = kept
    return result


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def load_state_dict(engine: Engine, state: Mapping[str, Any], *, strict: bool) -> Any:
    """Load a full state dict that every rank has; each keeps its slices. See ZeroModule.load_state_dict."""
    if engine.shards is None and not engine.has_meta_params():
        return nn.Module.load_state_dict(engine.model, state, strict=strict)
    names = _names(engine)
    missing = [name for name in names if name not in state]
    tied_elsewhere = {names[name] for name in state if name in names}
    missing = [name for name in missing if names[name] not in tied_elsewhere]
    unexpected = [name for name in state if name not in names and not name.endswith("_extra_state")]
    _check_shapes(engine, state, names)
    if strict and (missing or unexpected):
        raise CheckpointError(
            f"The state dict does not fit: missing {missing or 'nothing'}, unexpected {unexpected or 'nothing'}. Pass "
            "strict=False to load what fits."
        )
    engine.fix_layout_without_trace(loaded={names[name] for name in state if name in names})
    assert engine.shards is not None
    buffers = dict(engine.named_buffers())
    with torch.no_grad():
        for name, value in state.items():
            fqn = names.get(name)
            if fqn in engine.params:
                held = engine.params[fqn]
                held.copy_(engine.shards.cut(fqn, value))
            elif fqn is not None:
                buffers[fqn].copy_(value)
    return compat.incompatible_keys(missing, unexpected)


def _names(engine: Engine) -> dict[str, str]:
    """Every name a state dict may use, to the canonical name of its parameter or buffer."""
    canonical = {id(tensor): fqn for fqn, tensor in [*engine.params.items(), *engine.named_buffers()]}
    names: dict[str, str] = {}
    tensors = {
        **dict(engine.model.named_parameters(remove_duplicate=False)),
        **dict(engine.model.named_buffers(remove_duplicate=False)),
    }
    for name in nn.Module.state_dict(engine.model, keep_vars=True):
        if name in tensors:
            names[name] = canonical[id(tensors[name])]
    return names


def _check_shapes(engine: Engine, state: Mapping[str, Any], names: Mapping[str, str]) -> None:
    buffers = dict(engine.named_buffers())
    for name, value in state.items():
        fqn = names.get(name)
        if fqn is None:
            continue
        wanted = engine.specs[fqn].shape if fqn in engine.specs else tuple(buffers[fqn].shape)
        if not isinstance(value, torch.Tensor) or tuple(value.shape) != wanted:
            found = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            raise CheckpointError(f"{name} is {found} in the state dict and {wanted} in the model. Load a full one.")
