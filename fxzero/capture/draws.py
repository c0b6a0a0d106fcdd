"""Random draws of a traced step: exactly eager's, and once each, also where a checkpoint recomputes them.

While tracing, nothing random is drawn, so the seed of the real CPU generator is free to number the draws: every draw
has the present seed as its key and sets the next. torch.utils.checkpoint saves that generator's state in forward and
restores it around the recomputation, so a recomputed draw meets the key of the forward's, and reads its result instead
of drawing again. Where checkpoint does not (preserve_rng_state=False), the key is new, and so is the draw, as in eager.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fxzero.errors import CaptureError

aten = torch.ops.aten

_FIRST_KEY = 0x66785A6572306B79
"""Far from any seed that a user's code sets."""

_IDLE_ARGUMENTS = {"dropout_p": (0.0,), "training": (False,), "train": (False,)}
"""An operator that may draw does not if one of these arguments has one of these values."""


class Draws:
    """Runs operators below autograd; those that draw random numbers do so as eager does, and once."""

    def __init__(self) -> None:
        self.in_backward = False
        self._recorded: dict[int, tuple[Any, list[Tensor], list[Tensor]]] = {}

    def run(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of `op`, drawn, replayed or computed."""
        if op is aten.native_dropout.default:
            return self._dropout(*args, **kwargs)
        if op is aten.native_dropout_backward.default and args[1].dtype is not torch.bool:
            return aten.mul.Tensor(args[0], args[1])  # the mask is the noise that _dropout made
        if not _may_draw(op):
            return op(*args, **kwargs)
        arguments = _named_arguments(op, args, kwargs)
        if any(isinstance(value, torch.Generator) for value in arguments.values()):
            raise CaptureError(
                f"{op} draws from a torch.Generator of its own, whose state a compiled step cannot follow. "
                "Draw from the default generator (no generator=), or draw before the call and pass the tensor in."
            )
        if any(arguments.get(name) in idle for name, idle in _IDLE_ARGUMENTS.items()):
            return op(*args, **kwargs)
        return self._draw_in_place_or_out(op, args, kwargs, arguments)

    def _draw_in_place_or_out(
        self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], arguments: dict[str, Any]
    ) -> Any:
        written = [arguments[name] for name in _written_arguments(op) if arguments.get(name) is not None]
        result: Any = None

        def draw() -> tuple[list[Tensor], list[Tensor]]:
            nonlocal result
            result = op(*args, **kwargs)
            outputs = [result] if isinstance(result, Tensor) else list(result)
            return outputs, [aten.clone.default(tensor) for tensor in written]

        outputs, written_values = self._drawn(op, draw)
        if result is not None:
            return result
        for tensor, value in zip(written, written_values, strict=True):
            aten.copy_.default(tensor, value)
        if written and all(output.shape == written[0].shape for output in outputs) and _returns_argument(op):
            return written[0]
        fresh = [aten.alias.default(output) for output in outputs]
        return fresh[0] if len(op._schema.returns) == 1 else tuple(fresh)

    def _drawn(
        self, op: Any, draw: Callable[[], tuple[list[Tensor], list[Tensor]]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """What `draw` gives, or gave when the generator was in this state before."""
        key = torch.default_generator.initial_seed()
        if not _FIRST_KEY <= key <= _FIRST_KEY + len(self._recorded):
            raise CaptureError(
                f"The model seeds the random generator before {op}; a compiled step draws from the one generator that "
                "goes on from step to step. Seed before the training loop, not in forward."
            )
        torch.default_generator.manual_seed(key + 1)
        if key not in self._recorded:
            outputs, written = draw()
            self._recorded[key] = op, outputs, written
            return outputs, written
        first_op, outputs, written = self._recorded[key]
        if not self.in_backward or first_op is not op:
            raise CaptureError(
                f"{op} draws from a generator state that {first_op} drew from before, but is not its recomputation: "
                "the forward restores the state of the generator. Only torch.utils.checkpoint may do so."
            )
        return outputs, written

    def _dropout(self, x: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
        """Dropout in the arithmetic of ATen's `_dropout_impl`; the second result is what backward multiplies with."""
        op = aten.native_dropout.default
        if train is False or p == 0 or x.numel() == 0:
            return op(x, p, train)
        if p == 1:
            noise = aten.zeros.default([], dtype=x.dtype, device=x.device)
            return aten.mul.Tensor(x, noise), noise
        if x.device.type == "cpu":
            (noise,), _ = self._drawn(op, lambda: ([_scaled_bernoulli(x, 1 - p)], []))
            return aten.mul.Tensor(x, noise), noise
        result: list[Tensor] = []

        def draw() -> tuple[list[Tensor], list[Tensor]]:
            result.extend(op(x, p, train))
            return [result[1]], []

        (mask,), _ = self._drawn(op, draw)
        # The fused kernel computes x * mask * scale, forward and backward alike; only the mask is worth keeping.
        output = result[0] if result else aten.native_dropout_backward.default(x, mask, 1 / (1 - p))
        return output, mask


def _scaled_bernoulli(x: Tensor, keep: float) -> Tensor:
    """`empty_like(x).bernoulli_(keep).div_(keep)` without the in-place operators."""
    order = sorted(range(x.dim()), key=lambda dim: -x.stride(dim))
    dense = aten.permute.default(x, order)
    # Without MKL the kernel draws in the order of memory; with it, in the order of indices.
    if x.is_contiguous() or torch.backends.mkl.is_available() or not dense.is_contiguous():
        noise = aten.bernoulli.p(x, keep)
    else:
        inverse = sorted(range(x.dim()), key=order.__getitem__)
        noise = aten.permute.default(aten.bernoulli.p(dense, keep), inverse)
    return aten.div.Tensor(noise, keep)


@functools.lru_cache(maxsize=None)
def _may_draw(op: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in op.tags


@functools.lru_cache(maxsize=None)
def _written_arguments(op: Any) -> tuple[str, ...]:
    return tuple(arg.name for arg in op._schema.arguments if arg.alias_info is not None and arg.alias_info.is_write)


def _returns_argument(op: Any) -> bool:
    """True for operators like `bernoulli_`, whose result is the argument that they write."""
    return op._schema.returns[0].alias_info is not None


def _named_arguments(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    schema = op._schema.arguments
    named = {arg.name: arg.default_value for arg in schema if arg.has_default_value()}
    return {**named, **{arg.name: value for arg, value in zip(schema, args, strict=False)}, **kwargs}


@contextlib.contextmanager
def numbered_draws() -> Iterator[None]:
    """The CPU generator numbers draws inside, and is as before afterwards."""
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(_FIRST_KEY)
    try:
        yield
    finally:
        torch.default_generator.set_state(state)
