"""Parameters gathered for code that runs as it is, outside of a step, and without gradients."""

from collections.abc import Collection, Generator
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
    params = {fqn: sharded.params[fqn] for fqn in fqns if fqn not in sharded.whole}
    with torch.inference_mode(False), torch.no_grad():
        full = _full(sharded, params, name)
        shards = {fqn: params[fqn].data for fqn in full}
        for fqn, value in full.items():
            params[fqn].data = value
    before, sharded.whole = sharded.whole, sharded.whole.union(params)
    try:
        yield
    finally:
        sharded.whole = before
        with torch.inference_mode(False), torch.no_grad():
            after = {fqn: params[fqn].data for fqn in full}
            for fqn, shard in shards.items():
                params[fqn].data = shard
    with torch.inference_mode(False), torch.no_grad():
        for fqn, value in after.items():
            _keep_written(sharded, fqn, value, name)


def _full(sharded: ShardedModel, params: Collection[str], name: str) -> dict[str, Tensor]:
    """The parameters at their full shapes; none where the ranks have them so already."""
    if not params:
        return {}
    are_full = sharded.shards is None and not sharded.has_meta_params()
    if are_full and (sharded.comm.is_alone or not sharded.sync_init):
        return {}
    word = f"full parameters for {name}"
    copies = full_copies(sharded, rank0_only=False, of=params, phase=word, word=word)
    return {fqn: copies[fqn] for fqn in params}


def _keep_written(sharded: ShardedModel, fqn: str, value: Tensor, name: str) -> None:
    """Cut what a parameter holds after a block into this rank's shard, if it is another value than before."""
    param, spec = sharded.params[fqn], sharded.specs[fqn]
    if (tuple(value.shape), value.dtype) != (tuple(spec.shape), spec.dtype):
        raise FxzeroError(
            f"{name} has made {fqn} a {value.dtype} tensor of shape {tuple(value.shape)}; compile has fixed it as "
            f"{spec.dtype} {tuple(spec.shape)}. Change the model before fxzero.compile."
        )
    if param.grad is not None and param.grad.shape != param.shape:
        param.grad = None
        raise FxzeroError(
            f"{name} has run a backward on parameters that were gathered for it, so {fqn} has a gradient that ranks "
            "have not averaged, which is dropped. Let the method return the loss, and call backward on that."
        )
    shards = sharded.shards
    own = value if shards is None else shards.cut(fqn, value)
    if not torch.equal(own, param):
        param.copy_(own)
