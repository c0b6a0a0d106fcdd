"""Norms of gradients over all ranks: by name, and where `torch.nn.utils` computes them from slices of gradients."""

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fxzero import torch_internals
from fxzero.comm.tensor_parallel import Parts
from fxzero.module.sharded_model import ShardedModel
from fxzero.runtime.clip import across_parts, across_ranks, checked, share_of

_sharded: list[weakref.ref[ShardedModel]] = []
"""The models of whose gradients this rank has slices only, in the order in which they were compiled."""


_clips_to = ""
"""The bound of the clipping that is about to take a norm, as a part of the name of a phase."""


def watch_norms(sharded: ShardedModel) -> None:
    """Let norms that `torch.nn.utils` computes from gradients of this model be those over all ranks.

    `get_total_norm`, and `clip_grad_norm_`, which calls it, become collectives where they get such gradients.
    """
    if sharded.comm.is_alone and not sharded.parallel:
        return
    _sharded[:] = [each for each in _sharded if each() is not None]
    _sharded.append(weakref.ref(sharded))
    torch_internals.wrap_norms(_get_total_norm, _before_clip)


def grad_norms(sharded: ShardedModel, norm_type: float) -> dict[str, Tensor]:
    """See ZeroModule.grad_norms."""
    gradients, norm_type = checked(sharded.gradients, norm_type)
    grads = {fqn: param.grad for fqn, param in sharded.params.items() if param.requires_grad}
    gradients.settle()
    device = sharded.devices.compute
    norms = torch.stack([_norm(() if grad is None else (grad,), norm_type, device) for grad in grads.values()])
    is_there = torch.tensor([grad is not None for grad in grads.values()], dtype=norms.dtype, device=device)
    # A rank that holds nothing of a parameter may have no gradient of it where others do.
    both = across_ranks(sharded.comm, torch.stack([norms, is_there]), norm_type)
    if (parallel := sharded.cut_by) is not None:
        cut = torch.tensor([sharded.specs[fqn].is_cut for fqn in grads], device=device)
        both[0, cut] = across_ranks(Parts(parallel), both[0, cut], norm_type)
    reached = (both[1] > 0).tolist()
    return {fqn: norm for fqn, norm, is_reached in zip(grads, both[0], reached, strict=True) if is_reached}


def _get_total_norm(
    original: Callable[..., Tensor], tensors: Any, norm_type: float = 2.0, *args: Any, **kw: Any
) -> Any:
    """What `torch.nn.utils.get_total_norm` does."""
    global _clips_to
    clips_to, _clips_to = _clips_to, ""
    tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    for sharded in _models():
        assert sharded.gradients is not None
        sharded.gradients.check_own(tensors)
    own = [(sharded, each) for sharded in _models() if (each := _slices(sharded, tensors))]
    if not own:
        return original(tensors, norm_type, *args, **kw)
    ids, given = {id(tensor) for _, each in own for tensor in each}, set(map(id, tensors))
    ignored = {id(tensor) for sharded, _ in own for tensor in sharded.ignored_gradients()}
    others = [tensor for tensor in tensors if id(tensor) not in ids | ignored]
    norm_type = float(norm_type)
    totals = [_norm(others, norm_type, tensors[0].device)]
    for sharded, each in own:
        checked(sharded.gradients, norm_type)
        beside = [gradient for gradient in sharded.ignored_gradients() if id(gradient) in given]
        with sharded.phases.phase(f"norm of order {norm_type} of gradients{clips_to}"):
            totals.append(_total_of(sharded, each, beside, norm_type))
    # The last call checks that the norm is finite, if that is asked for.
    return original([total.to(tensors[0].device) for total in totals], norm_type, *args, **kw)


def _total_of(sharded: ShardedModel, slices: Sequence[Tensor], ignored: Sequence[Tensor], norm_type: float) -> Tensor:
    """The norm over all ranks of gradients of which this rank has slices, and of those of ignored parameters."""
    device = sharded.devices.compute
    if (parallel := sharded.cut_by) is None:
        norm = _norm(slices, norm_type, device)
        if ignored:
            share = share_of(ignored, norm_type, sharded.comm.shard_ranks)
            norm = torch.linalg.vector_norm(torch.stack([norm, share.to(norm)]), norm_type)
        return across_ranks(sharded.comm, norm, norm_type)
    cut_ids = {id(sharded.params[fqn].grad) for fqn, spec in sharded.specs.items() if spec.is_cut}
    cut, rest = (
        _norm([each for each in slices if (id(each) in cut_ids) == is_cut], norm_type, device)
        for is_cut in (True, False)
    )
    return across_parts(sharded.comm, parallel, cut.double(), rest.double(), norm_type).to(
        torch.promote_types(cut.dtype, rest.dtype)
    )


def phase_of_clip(max_norm: Any, norm_type: float) -> str:
    """The name of the phase in which gradients are clipped: ranks do so alike. A tensor's value would be waited for."""
    bound = f"max_norm={max_norm}" if isinstance(max_norm, (int, float)) else "a tensor"
    return f"clip_grad_norm_({bound}, norm_type={norm_type})"


def _before_clip(parameters: Any, max_norm: Any) -> None:
    """Bring gradients that the user put in the place of slices back there, so that they are known for slices.

    Args:
        max_norm: becomes a part of the name of the phase that follows.
    """
    global _clips_to
    _clips_to = f" for max_norm={max_norm}" if isinstance(max_norm, (int, float)) else ""
    ids = {id(parameter) for parameter in parameters}
    for sharded in _models():
        if sharded.gradients is not None and not ids.isdisjoint(sharded.ids):
            sharded.gradients.check_reduced(ids)
            sharded.gradients.settle()


def _models() -> Iterable[ShardedModel]:
    for reference in _sharded:
        if (sharded := reference()) is not None and sharded.gradients is not None:
            yield sharded


def _slices(sharded: ShardedModel, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Those of the tensors that are this rank's slices of gradients."""
    assert sharded.gradients is not None
    ids = set(map(id, sharded.gradients.each))
    return [tensor for tensor in tensors if id(tensor) in ids]


def _norm(tensors: Iterable[Tensor], norm_type: float, device: torch.device) -> Tensor:
    """The norm of tensors that may have no elements, in fp32 at least: a tensor `[]`."""
    norms = [
        torch.linalg.vector_norm(tensor, norm_type, dtype=torch.promote_types(tensor.dtype, torch.float32))
        for tensor in tensors
        if tensor.numel()
    ]
    zero = torch.zeros((), dtype=torch.float32, device=device)
    return torch.linalg.vector_norm(torch.stack([zero, *norms]), norm_type) if norms else zero
