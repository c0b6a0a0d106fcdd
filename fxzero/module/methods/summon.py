"""`with zero.summon_full_params():`, whole parameters in the place of shards for a block of the user's code."""

import contextlib
import difflib
import zlib
from collections.abc import Collection, Generator, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from fxzero import torch_internals
from fxzero.checkpoint.values import bytes_of
from fxzero.comm import agree
from fxzero.errors import CommunicationError, FxzeroError
from fxzero.module.engine import Engine
from fxzero.module.methods.gathered import check_values, full_values, in_place, put, store_values
from fxzero.module.ownership import as_uncompiled
from fxzero.module.registered_tensors import join
from fxzero.module.sharded_model import ShardedModel
from fxzero.runtime.shards import flatten


@contextmanager
def summon(engine: Engine, names: Iterable[str] | None, *, writeback: bool, rank0_only: bool) -> Generator[None]:
    """Let parameters be whole inside of the block; a collective. See `ZeroModule.summon_full_params`."""
    sharded = engine.sharded
    chosen = list(sharded.params) if names is None else _chosen(sharded, names)
    name = _name_of(None if names is None else chosen, writeback=writeback, rank0_only=rank0_only)
    missing = [fqn for fqn in chosen if fqn not in sharded.whole]
    values = full_values(sharded, missing, name, rank0_only=rank0_only)
    whole = list(values) if sharded.shards is not None else chosen
    if not writeback:
        values |= {fqn: sharded.params[fqn].detach().clone() for fqn in chosen if fqn not in values}
    is_of_rank0 = rank0_only and bool(missing)
    grads = _gradients(sharded, whole)
    try:
        with ExitStack() as stack:
            stack.enter_context(sharded.phases.in_block(name, may_gather=not is_of_rank0))
            after = stack.enter_context(in_place(sharded, values, whole=whole))
            if len(sharded.whole) == len(sharded.params) and not sharded.precision.policies:
                stack.enter_context(as_uncompiled(sharded.model))
            yield
    except BaseException as error:
        if missing:
            _fail(sharded, name, error)
        raise
    if (sharded.ids | sharded.ignored_ids).symmetric_difference(map(id, sharded.model.parameters())):
        engine.plans.clear()  # the next call looks at the modules, and says so
    if missing:
        changed = [fqn for fqn, grad in _gradients(sharded, whole).items() if grad != grads.get(fqn)]
        for fqn in changed:
            sharded.params[fqn].grad = None
        _end(sharded, name, after if writeback else None, missing, changed, rank0_only=is_of_rank0)


def _chosen(sharded: ShardedModel, names: Iterable[str]) -> list[str]:
    """The canonical names of parameters by any of their names, or those of modules."""
    known = {
        join(path, name): sharded.fqn_of(param)
        for path, module in sharded.model.named_modules(remove_duplicate=False)
        for name, param in torch_internals.tensor_tables(module)[0].items()
        if id(param) in sharded.ids
    }
    found: dict[str, None] = {}
    for name in [names] if isinstance(names, str) else list[Any](names):
        if not isinstance(name, str):
            raise TypeError(f"names has a {type(name).__name__}; it must have names of parameters or paths of modules.")
        fqns = [fqn for each, fqn in known.items() if each == name or each.startswith(f"{name}.")]
        if not fqns and not any(each == name or each.startswith(f"{name}.") for each in sharded.ignored):
            close = difflib.get_close_matches(name, known, 1)
            raise ValueError(
                f"names has {name!r}, which is no parameter of the model, and no module with parameters."
                + (f" Do you mean {close[0]!r}?" if close else "")
            )
        found |= dict.fromkeys(fqns)
    return list(found)


def _name_of(chosen: Collection[str] | None, *, writeback: bool, rank0_only: bool) -> str:
    """The call as text, which is equal on all ranks if the calls are."""
    options = [] if writeback else ["writeback=False"]
    options += ["rank0_only=True"] if rank0_only else []
    if chosen is not None:
        more = f" and {len(chosen) - 1} more ({zlib.crc32(repr(chosen).encode()):x})" if len(chosen) > 1 else ""
        options.insert(0, f"{next(iter(chosen), 'nothing')}{more}")
    return f"summon_full_params({', '.join(options)})"


def _gradients(sharded: ShardedModel, fqns: Collection[str]) -> dict[str, tuple[int, int]]:
    """Which tensor the gradient of each parameter is that has one, and how often that was changed."""
    if sharded.shards is None:
        return {}
    grads = {fqn: sharded.params[fqn].grad for fqn in fqns}
    return {fqn: (id(grad), torch_internals.num_changes([grad])) for fqn, grad in grads.items() if grad is not None}


def _fail(sharded: ShardedModel, name: str, error: BaseException) -> None:
    """Tell the ranks that come to the end of the block that this one has left it in an error."""
    with sharded.phases.gathering(), contextlib.suppress(CommunicationError):
        sharded.phases.begin(f"end of {name}")
    sharded.phases.failed(error)
    sharded.phases.end()


def _end(
    sharded: ShardedModel,
    name: str,
    after: Mapping[str, Tensor] | None,
    missing: Collection[str],
    differentiated: Collection[str],
    *,
    rank0_only: bool,
) -> None:
    """Write what the block has left in parameters into the shards; a collective.

    Args:
        after: what it has left; None if changes are dropped.
        missing: the parameters that were gathered.
        differentiated: those that a backward in the block has reached.

    Raises:
        FxzeroError: the block has given a parameter another shape, or a gradient.
        RankMismatchError: ranks have other values.
    """
    with sharded.phases.gathering(), sharded.phases.phase(f"end of {name}"):
        if differentiated:
            raise FxzeroError(
                f"A backward inside of {name} has reached {next(iter(differentiated))}; its gradient there is one that "
                "ranks have not averaged, and is dropped. Call the compiled module outside for gradients."
            )
        check_values(sharded, after or {}, name)
        sharded.comm.meet()
        is_of_each = sharded.shards is None and not sharded.sync_init
        if not rank0_only and not sharded.comm.is_alone and not is_of_each and after:
            lines = [f"{fqn} (crc32 {zlib.crc32(bytes_of(value)):x})" for fqn, value in after.items()]
            agree.agree(sharded.group, f"values at the end of {name}", lines, timeout=sharded.timeout)
    if after is None:
        return
    if rank0_only and sharded.shards is not None:
        _send(sharded, name, after, missing)
    else:
        store_values(sharded, after)


def _send(sharded: ShardedModel, name: str, after: Mapping[str, Tensor], fqns: Collection[str]) -> None:
    """Give all ranks their slices of what rank 0 has of some parameters."""
    shards, comm = sharded.shards, sharded.comm
    assert shards is not None
    for bucket in shards.layout.buckets:
        members = [spec for spec in bucket.params if spec.fqn in fqns]
        if not members:
            continue
        received = torch.empty_like(shards.params.parts[bucket])
        with sharded.phases.gathering(), sharded.phases.phase(f"sending of {members[0].fqn} and more for {name}"):
            comm.meet()
            comm.scatter_from_rank0(received, flatten(bucket, after, shards.device) if comm.is_rank0 else None)
        for spec in members:
            part, param = bucket.slice_of(spec, comm.rank), sharded.params[spec.fqn]
            with torch.no_grad():
                put(received[part.offset : part.offset + part.numel].view(param.shape), param)
