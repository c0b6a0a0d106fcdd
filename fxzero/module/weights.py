"""Weights as state dicts: gathered from the shards, shown as pieces of them, and loaded into them.

Each of these functions is a collective.
"""

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fxzero import torch_internals
from fxzero.checkpoint.callers import is_asked_by_checkpoint
from fxzero.checkpoint.pieces import full_tensor
from fxzero.comm import agree
from fxzero.comm.tensor_parallel import whole_of
from fxzero.errors import CheckpointError
from fxzero.module.first_fill import fix_layout_without_trace
from fxzero.module.registered_tensors import entries, join, standing_in
from fxzero.module.replaced_data import in_shards
from fxzero.module.sharded_model import ShardedModel
from fxzero.planning.agreed_text import describe_buffers, describe_options, describe_params
from fxzero.runtime.interleave import gathered_members


def full_params(
    sharded: ShardedModel, *, rank0_only: bool, of: Collection[str] | None = None, word: str = "full parameters"
) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Gather the parameters bucket by bucket: `(name, full tensor)`, None on other ranks if `rank0_only`.

    Each tensor is a view of memory that the next bucket overwrites. Every rank must iterate to the end.

    Args:
        of: gather the buckets of these parameters alone.
        word: what is gathered, in the names of phases.
    """
    assert sharded.shards is not None
    shards, comm = sharded.shards, sharded.comm
    buckets = [each for each in shards.layout.buckets if of is None or not set(each.fqns).isdisjoint(of)]
    largest = max((bucket.shard_ranks * bucket.shard_nbytes for bucket in buckets), default=0)
    is_given = comm.is_rank0 or not rank0_only
    room = torch.empty(largest if is_given else 0, dtype=torch.uint8, device=shards.device)
    with in_shards(sharded.replaced()):
        for number, bucket in enumerate(buckets, 1):
            shard = shards.params.parts[bucket]
            full = room[: bucket.shard_ranks * bucket.shard_nbytes].view(bucket.dtypes.shard)
            with sharded.phases.phase(f"gathering of {word} ({number} of {len(buckets)})"):
                comm.meet()
                if rank0_only:
                    comm.gather_to_rank0(shard, full if is_given else None)
                else:
                    comm.gather_to_all(shard, full)
            for fqn, value in gathered_members(bucket, full) if is_given else ((fqn, None) for fqn in bucket.fqns):
                whole = None if value is None else whole_of(sharded.specs[fqn].parallel, value)
                yield fqn, None if rank0_only and not sharded.is_rank0 else whole


def state_dict(
    sharded: ShardedModel, *, rank0_only: bool, prefix: str = "", destination: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The full state dict with the model's own names, in which tied parameters share one tensor.

    See `ZeroModule.state_dict`.
    """
    is_in_pieces = is_asked_by_checkpoint()
    if is_in_pieces:
        before_checkpoint(sharded)
    full = _pieces(sharded) if is_in_pieces else full_copies(sharded, rank0_only=rank0_only)
    with sharded.phases.phase("state_dict"):
        sharded.comm.meet()
        full |= _buffer_copies(sharded, rank0_only=rank0_only)
    full |= {fqn: param.detach().clone() for fqn, param in sharded.ignored.items()}
    result: dict[str, Any] = OrderedDict() if destination is None else destination
    if sharded.is_rank0 or not rank0_only:
        with standing_in(sharded.model, full):
            own: Any = type(sharded.model).state_dict
            local: dict[str, Any] = own(sharded.model, **({"prefix": prefix} if prefix else {}))
        copies = {} if is_in_pieces else {copy.untyped_storage().data_ptr(): copy for copy in full.values()}
        result.update({name: _the_copy(value, copies) for name, value in local.items()})
        torch_internals.add_metadata(result, local)
    return result


def trainable_state_dict(sharded: ShardedModel, *, rank0_only: bool, prefix: str = "") -> dict[str, torch.Tensor]:
    """The full parameters that need a gradient; tied ones under each of their names. See `ZeroModule.state_dict`."""
    names = _trainable(sharded)
    copies = full_copies(sharded, rank0_only=rank0_only, of={*names.values()})
    if sharded.is_rank0 or not rank0_only:
        copies |= {fqn: param.detach().clone() for fqn, param in sharded.ignored.items()}
    return {f"{prefix}{name}": copies[fqn] for name, fqn in names.items() if fqn in copies}


def _trainable(sharded: ShardedModel) -> dict[str, str]:
    """`_names` of the parameters that need a gradient."""
    params = sharded.params | sharded.ignored
    trained = {fqn for fqn, param in params.items() if param.requires_grad}
    return {name: fqn for name, fqn in _names(sharded).items() if fqn in trained}


def _the_copy(value: Any, copies: Mapping[int, torch.Tensor]) -> Any:
    """The copy that a value is a view of, so that tied parameters share one tensor; the value itself if it is not."""
    copy = copies.get(value.untyped_storage().data_ptr()) if copies and isinstance(value, torch.Tensor) else None
    if copy is not None and (copy.shape, copy.dtype, copy.stride()) == (value.shape, value.dtype, value.stride()):
        return copy
    return value


def before_checkpoint(sharded: ShardedModel) -> None:
    """Make shards, if there are none, because torch.distributed.checkpoint is about to look at them."""
    with sharded.phases.phase("checkpoint"):
        fix_layout_without_trace(sharded)


def _pieces(sharded: ShardedModel) -> dict[str, torch.Tensor]:
    """Each parameter as this rank's piece of it, by canonical name."""
    assert sharded.pieces is not None
    sharded.replaced()  # refuses data of other shapes
    return {fqn: sharded.pieces.show(sharded.specs[fqn], param) for fqn, param in sharded.params.items()}


def _buffer_copies(sharded: ShardedModel, *, rank0_only: bool) -> dict[str, torch.Tensor]:
    """Copies of the buffers that state dicts have, by canonical name: those of rank 0, unless `rank0_only`."""
    copies: dict[str, torch.Tensor] = {}
    for entry in entries(sharded.model):
        slot = entry.slots[0]
        if not entry.is_param and torch_internals.is_persistent(slot.module, slot.name):
            copies[entry.fqn] = copy = entry.tensor.detach().clone()
            if not rank0_only and _has_rank0(sharded):
                sharded.comm.broadcast_from_rank0(copy)
                sharded.send_to_parts(copy)
    return copies


def _has_rank0(sharded: ShardedModel) -> bool:
    """False if each rank keeps its own values: before the layout is fixed, with `sync_init=False`."""
    return sharded.shards is not None or sharded.sync_init


def full_copies(
    sharded: ShardedModel,
    *,
    rank0_only: bool,
    of: Collection[str] | None = None,
    phase: str = "state_dict",
    word: str = "full parameters",
) -> dict[str, torch.Tensor]:
    """A copy of each parameter at full size by canonical name; empty on other ranks if `rank0_only`.

    Args:
        of: the parameters; others may be among the copies. Default: all.
        phase, word: the name of the phase, and of what is gathered.
    """
    with sharded.phases.phase(phase):
        if sharded.shards is None and not sharded.has_meta_params():  # nothing is sharded yet
            if not rank0_only:
                lines = describe_options(sharded.agreed) + describe_params(sharded.specs.values())
                lines += describe_buffers(sharded.model)
                agree.agree(sharded.group, "state dict", lines, timeout=sharded.timeout)
            given = {} if rank0_only and not sharded.comm.is_rank0 else sharded.params
            given = {fqn: param for fqn, param in given.items() if of is None or fqn in of}
            copies = {fqn: param.detach().clone() for fqn, param in given.items()}
            if not rank0_only and _has_rank0(sharded):
                for fqn, copy in copies.items():
                    sharded.comm.broadcast_from_rank0(copy)
                    if not sharded.specs[fqn].is_cut:
                        sharded.send_to_parts(copy)
            copies = {fqn: whole_of(sharded.specs[fqn].parallel, copy) for fqn, copy in copies.items()}
            return copies if sharded.is_rank0 or not rank0_only else {}
        fix_layout_without_trace(sharded)
    gathered = full_params(sharded, rank0_only=rank0_only, of=of, word=word)
    return {fqn: value.clone() for fqn, value in gathered if value is not None and (of is None or fqn in of)}


def load_state_dict(
    sharded: ShardedModel,
    state: Mapping[str, Any],
    *,
    strict: bool,
    trainable_only: bool = False,
    then: Callable[[Any], None] | None = None,
) -> Any:
    """Load a state dict that every rank passes; each keeps its slices. See `ZeroModule.load_state_dict`.

    Args:
        then: called with the missing and the unexpected names when what fits is loaded; it may change them, so that
            these are refused behind it.
    """
    source = state
    with sharded.phases.phase("load_state_dict"):
        with agree.reporting_failure(sharded.group, _TOPIC):
            names, extra = (_trainable(sharded), {}) if trainable_only else (_names(sharded), _extra_states(sharded))
            state = dict(state)
            missing, unexpected, own = _run_load_hooks(sharded, state, source, converts=not trainable_only)
            extra = {name: module for name, module in extra.items() if name.rpartition(".")[0] not in own}
            given = {names[name] for name in state if name in names}
            lacking = [name for name, fqn in names.items() if name not in state and fqn not in given]
            missing += [name for name in lacking if name.rpartition(".")[0] not in own]
            missing += [name for name in extra if name not in state]
            others = [name for name in state if name not in names and name not in extra]
            unexpected += [name for name in others if name.rpartition(".")[0] not in own]
            if strict and then is None:
                _check_fits(missing, unexpected)
            tensors = {name: state[name] for name in names if name in state}
            _check_tensors(sharded, tensors, names)
        if sharded.shards is not None or sharded.has_meta_params():
            agree.agree(sharded.group, _TOPIC, _describe(tensors), timeout=sharded.timeout)
            fix_layout_without_trace(sharded, loaded=given)
    with torch.no_grad():
        for name, value in tensors.items():
            _load(sharded, names[name], value)
    for name, module in extra.items():
        if name in state:
            module.set_extra_state(state[name])
    keys = torch_internals.incompatible_keys(missing, unexpected)
    if then is not None:
        then(keys)
        if strict:
            _check_fits(missing, unexpected)
    return keys


def _check_fits(missing: Sequence[str], unexpected: Sequence[str]) -> None:
    if missing or unexpected:
        raise CheckpointError(
            f"The state dict does not fit: missing {missing or 'nothing'}, unexpected {unexpected or 'nothing'}. Pass "
            "strict=False to load what fits."
        )


_TOPIC = "state dict to load"


def _describe(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """What all ranks must pass, one tensor a line."""
    return [f"{name} {tuple(value.shape)}" for name, value in tensors.items()] or ["nothing"]


def _load(sharded: ShardedModel, fqn: str, value: torch.Tensor) -> None:
    """Copy a value into a parameter or a buffer; gathers what is a DTensor, but no piece of this rank's slice."""
    if fqn not in sharded.params:
        sharded.plain_tensors()[fqn].copy_(full_tensor(value))
    elif sharded.pieces is None:
        sharded.params[fqn].copy_(sharded.specs[fqn].local_of(full_tensor(value)))
    else:
        sharded.params[fqn].copy_(sharded.pieces.cut(sharded.specs[fqn], value, fqn))


def _names(sharded: ShardedModel) -> dict[str, str]:
    """Maps every name of a tensor in a state dict to the canonical name of its parameter or buffer."""
    canonical = {id(tensor): fqn for fqn, tensor in (sharded.params | sharded.plain_tensors()).items()}
    names: dict[str, str] = {}
    for path, module in sharded.model.named_modules(remove_duplicate=False):
        params, buffers = torch_internals.tensor_tables(module)
        saved = {name: value for name, value in buffers.items() if torch_internals.is_persistent(module, name)}
        table = {**params, **saved}
        names |= {join(path, name): canonical[id(value)] for name, value in table.items() if value is not None}
    return names


def _extra_states(sharded: ShardedModel) -> dict[str, nn.Module]:
    """The modules that define `get_extra_state`, by the name of that state in a state dict."""
    return {
        join(path, torch_internals.EXTRA_STATE): module
        for path, module in sharded.model.named_modules()
        if type(module).get_extra_state is not nn.Module.get_extra_state
    }


def _run_load_hooks(
    sharded: ShardedModel, state: dict[str, Any], source: Any, *, converts: bool
) -> tuple[list[str], list[str], set[str]]:
    """Run the load hooks of the modules, and what modules have to load in their own way: renaming, converting.

    Args:
        state: is changed.
        source: the state dict that it is a copy of.
        converts: let modules load in their own way.

    Returns:
        The names reported as missing, those reported as unexpected, and the paths of the modules that have looked for
        these themselves.
    """
    missing, unexpected, errors, own = list[str](), list[str](), list[str](), set[str]()
    for path, module in sharded.model.named_modules():
        prefix, metadata = join(path, ""), torch_internals.metadata_of(source, path)
        rest = prefix, metadata, True, missing, unexpected, errors
        if converts and state and torch_internals.loads_in_its_own_way(module) and not _has_dtensors(state, prefix):
            _convert(sharded, module, state, *rest)
            own.add(path)
            continue
        for hook in torch_internals.load_hooks(module):
            hook(state, *rest)
    if errors:
        raise CheckpointError(f"The state dict does not fit: {'; '.join(errors)}")
    return missing, unexpected, own


def _has_dtensors(state: Mapping[str, Any], prefix: str) -> bool:
    return torch_internals.has_dtensors([type(value) for name, value in state.items() if name.startswith(prefix)])


def _convert(sharded: ShardedModel, module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Let a module load its own tensors in its own way, into others, and put those into the state dict."""
    params, buffers = torch_internals.tensor_tables(module)
    device = sharded.devices.shards
    held = [(params, name, each) for name, each in params.items() if id(each) in sharded.ids]
    held += [(buffers, n, b) for n, b in buffers.items() if b is not None and torch_internals.is_persistent(module, n)]
    others: list[torch.Tensor] = []
    for table, name, tensor in held:
        if table is params:
            spec = sharded.specs[sharded.fqn_of(tensor)]
            value = torch.empty(spec.whole_shape, dtype=spec.dtype, device=device if tensor.is_meta else tensor.device)
            others.append(nn.Parameter(value, requires_grad=tensor.requires_grad))
        else:
            others.append(torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.detach().clone())
        table[name] = others[-1]
    before = torch_internals.changes_of_each(others, range(len(others)))
    try:
        torch_internals.own_method(module, torch_internals.LOAD)(state, prefix, *rest)
    finally:
        for (table, name, tensor), other in zip(held, others, strict=True):
            if table.get(name) is other:
                table[name] = tensor
    after = torch_internals.changes_of_each(others, range(len(others)))
    for (_, name, _), other, was, now in zip(held, others, before, after, strict=True):
        state.pop(f"{prefix}{name}", None)
        if was != now:
            state[f"{prefix}{name}"] = other.detach()


def _check_tensors(sharded: ShardedModel, tensors: Mapping[str, Any], names: Mapping[str, str]) -> None:
    shapes = {fqn: tuple(tensor.shape) for fqn, tensor in sharded.plain_tensors().items()}
    shapes.update({fqn: spec.whole_shape for fqn, spec in sharded.specs.items()})
    for name, value in tensors.items():
        wanted = shapes[names[name]]
        found = tuple(value.shape) if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
        if found != wanted:
            raise CheckpointError(f"{name} is {found} in the state dict and {wanted} in the model. Load a full one.")
        if value.device.type == "meta":
            raise CheckpointError(f"{name} is on the meta device in the state dict: it has no values.")
