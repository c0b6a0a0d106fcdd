"""DTensors in a trace: parameters of tensor parallelism, around the local tensors that are inputs of the graph.

The model's own hooks make DTensors of activations, and a DTensor runs each operator on local tensors, with collectives
where it must. The trace sees those, so that its graph has no DTensor.
"""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fxzero import torch_internals
from fxzero.errors import CaptureError
from fxzero.graph.layout import ParamSpec


def is_dtensor(tensor: Tensor) -> bool:
    """True for a DTensor."""
    return torch_internals.has_dtensors((type(tensor),))


def fake_params(specs: Mapping[str, ParamSpec], device: torch.device, fake_mode: Any) -> dict[str, Tensor]:
    """Fake parameters, DTensors where the model had such; to be called under the fake mode."""
    return {name: torch_internals.as_parameter(_fake_param(spec, device, fake_mode)) for name, spec in specs.items()}


def _fake_param(spec: ParamSpec, device: torch.device, fake_mode: Any) -> Tensor:
    dtype, needs_grad, parallel = spec.dtypes.compute, spec.requires_grad, spec.parallel
    if parallel is None:
        return torch_internals.fake_leaf(fake_mode, spec.shape, dtype, device, requires_grad=needs_grad)
    local = torch.empty(spec.shape, dtype=dtype, device=device)
    return torch_internals.dtensor_around(
        local, parallel.mesh, parallel.placement, parallel.shape, requires_grad=needs_grad
    )


def local_tensor(tensor: Tensor) -> Tensor:
    """The local tensor of a DTensor; another tensor itself."""
    return torch_internals.local_of(tensor) if is_dtensor(tensor) else tensor


def local_gradient(gradient: Tensor | None) -> Tensor | None:
    """The local tensor of a gradient; None where there is none."""
    return None if gradient is None else local_tensor(gradient)


@contextmanager
def placed_gradients(leaves: Sequence[Tensor]) -> Generator[None]:
    """Let gradients of DTensors be placed as these are, by a collective where they are partial sums.

    FSDP2 does so before it reduces a gradient: `FSDPParam.unsharded_grad_data`.
    """
    handles = [leaf.register_hook(partial(_place, leaf)) for leaf in leaves if is_dtensor(leaf)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _place(leaf: Any, gradient: Any) -> Any:
    return gradient.redistribute(placements=leaf.placements)


def check_no_dtensors(outputs: Sequence[Tensor]) -> None:
    """Refuse DTensors among what the model returns.

    Raises:
        CaptureError: there is one.
    """
    if any(map(is_dtensor, outputs)):
        raise CaptureError(
            "The model returns a DTensor. Return its local tensor or the whole one: to_local() or full_tensor(), or "
            "use_local_output=True and output_layouts=Replicate() in the plan of the last module."
        )


def refuse_draw(op: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse an operator that draws random numbers for a DTensor.

    Raises:
        CaptureError: it does.
    """
    if torch.Tag.nondeterministic_seeded not in op.tags:
        return
    if torch_internals.named_arguments(op, args, dict(kwargs)).get("dropout_p") != 0.0:
        raise CaptureError(
            f"{op} draws random numbers for a DTensor, of which each rank of tensor parallelism has a part of its own. "
            "Let dropout run on local tensors (use_local_output=True), or turn it off."
        )
