"""Parameters gathered for code that runs as it is, outside of a step, and without gradients."""

from collections.abc import Collection, Generator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fxzero.errors import FxzeroError
from fxzero.module.sharded_model import ShardedModel
from fxzero.module.weights import full_copies


def fqns_of(sharded: ShardedModel, part: nn.Module) -> list[str]:
    """The canonical names of the parameters of a part of a model."""
    held = set(map(id, part.parameters()))
    return [fqn for fqn, param in sharded.params.items() if id(param) in held]


@contextmanager
def gathered(sharded: ShardedModel, fqns: Collection[str], name: str) -> Generator[None]:
    """Let the data of parameters have their full shapes inside of the block, on all ranks; a collective.

    What the block writes into them, each rank cuts into its shards.

    Args:
        name: of what needs them, for the names of phases.

    Raises:
        FxzeroError: the block has given a parameter another shape, or a gradient.
    """
    missing = [fqn for fqn in fqns if fqn not in sharded.whole]
    full = full_values(sharded, missing, name)
    with in_place(sharded, full, whole=missing) as after:
        yield
    check_values(sharded, after, name)
    store_values(sharded, after)


def full_values(
    sharded: ShardedModel, fqns: Collection[str], name: str, *, rank0_only: bool = False
) -> dict[str, Tensor]:
    """Parameters at their full shapes; none where the ranks have them so already, or other ranks if `rank0_only`."""
    if not fqns:
        return {}
    if parts := [fqn for fqn in fqns if sharded.specs[fqn].parallel]:
        raise FxzeroError(
            f"{name} needs {parts[0]} as the model had it before fxzero.compile, a DTensor, which it is in a step "
            "alone. To read whole parameters take zero.state_dict() or zero.iter_full_params()."
        )
    are_full = sharded.shards is None and not sharded.has_meta_params()
    if are_full and (sharded.comm.is_alone or not sharded.sync_init):
        return {}
    word = f"full parameters for {name}"
    with torch.inference_mode(False), torch.no_grad(), sharded.phases.gathering():
        copies = full_copies(sharded, rank0_only=rank0_only, of=fqns, phase=word, word=word)
    return {fqn: copies[fqn] for fqn in fqns if fqn in copies}


@contextmanager
def in_place(
    sharded: ShardedModel, values: Mapping[str, Tensor], *, whole: Collection[str]
) -> Generator[dict[str, Tensor]]:
    """Let other tensors be the data of parameters inside of the block.

    Args:
        whole: names of parameters that have their full shapes then.

    Yields:
        A mapping that gets their data as it is at the end of the block.
    """
    params, at_the_end = sharded.params, dict[str, Tensor]()
    with torch.inference_mode(False), torch.no_grad():
        data = {fqn: params[fqn].data for fqn in values}
        for fqn, value in values.items():
            params[fqn].data = value
    before, sharded.whole = sharded.whole, sharded.whole.union(whole)
    try:
        yield at_the_end
    finally:
        sharded.whole = before
        with torch.inference_mode(False), torch.no_grad():
            at_the_end.update({fqn: params[fqn].data for fqn in values})
            for fqn, own in data.items():
                params[fqn].data = own


def check_values(sharded: ShardedModel, values: Mapping[str, Tensor], name: str) -> None:
    """Refuse what parameters hold after a block, if they cannot keep it.

    Raises:
        FxzeroError: the block has given a parameter another shape, or a gradient.
    """
    for fqn, value in values.items():
        param, spec = sharded.params[fqn], sharded.specs[fqn]
        if (tuple(value.shape), value.dtype) != (tuple(spec.shape), spec.dtype):
            raise FxzeroError(
                f"{name} has made {fqn} a {value.dtype} tensor of shape {tuple(value.shape)}; compile has fixed it as "
                f"{spec.dtype} {tuple(spec.shape)}. Change the model before fxzero.compile."
            )
        if param.grad is not None and param.grad.shape != param.shape:
            param.grad = None
            raise FxzeroError(
                f"{name} has run a backward on parameters that were gathered for it, so {fqn} has a gradient that "
                "ranks have not averaged, which is dropped. Let the method return the loss, and call backward on that."
            )


def store_values(sharded: ShardedModel, values: Mapping[str, Tensor]) -> None:
    """Cut full values into this rank's shards, where they are other values than those."""
    shards = sharded.shards
    with torch.inference_mode(False), torch.no_grad():
        for fqn, value in values.items():
            put(value if shards is None else shards.cut(fqn, value), sharded.params[fqn])


def put(value: Tensor, param: nn.Parameter) -> None:
    """Copy a value into a parameter that has other bits: 0.0 and -0.0 differ, and a NaN equals itself."""
    bits, now = (each.detach().reshape(-1).view(torch.uint8) for each in (value, param))
    if not torch.equal(bits, now):
        param.copy_(value)
