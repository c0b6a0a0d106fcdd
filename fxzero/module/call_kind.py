"""Kinds of calls, each of which has a plan of its own for each pattern of arriving gradients.

key of a plan    known when            contents
Signature        a call begins         geometry and plain values of the arguments, modes of torch and of the modules
Pattern          its backward begins   outputs that receive a gradient; a forward assumes those of the call before
"""

import contextlib
import functools
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from fxzero.capture.call import CallSpec, TensorLeaf

Arguments: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]
"""The positional and the keyword arguments of a call."""
Pattern: TypeAlias = tuple[int, ...]
"""Indices of the flat outputs that receive a gradient."""


@dataclass(frozen=True)
class Method:
    """A method of the model that is called in the place of the model itself."""

    name: str
    function: Callable[..., Any]
    """Bound to the model."""


@dataclass(frozen=True)
class Signature:
    """Everything that chooses the plan of a call when it begins."""

    method: Method | None
    """None for a call of the model, with its hooks."""
    call: CallSpec
    training: tuple[bool, ...]
    """`training` of each module."""
    trained: tuple[bool, ...]
    """`requires_grad` of each parameter."""
    grad: bool
    """`torch.is_grad_enabled()`."""
    autocast: tuple[bool, Any]
    """Whether autocast is on for the device that computes, and its dtype then."""
    settings: tuple[Any, ...]
    """Settings of torch that choose kernels; see `settings()`."""
    ignored: tuple[TensorLeaf, ...] = ()
    """The geometry of each ignored parameter."""

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        """Of hundreds of flags, for several lookups in each call."""
        flags = self.method, self.training, self.trained, self.grad, self.autocast, self.settings
        return hash((self.call, flags, self.ignored))

    @property
    def may_have_backward(self) -> bool:
        """True if some parameter or some input needs a gradient, where gradients are enabled."""
        needs_grad = any(leaf.requires_grad for leaf in (*self.tensor_leaves, *self.ignored))
        return self.grad and (needs_grad or any(self.trained))

    @property
    def called(self) -> str:
        """The name of the method that is called; empty for the model itself."""
        return "" if self.method is None else self.method.name

    @property
    def tensor_leaves(self) -> list[TensorLeaf]:
        """The geometry of each tensor among the arguments."""
        return [leaf for leaf in self.call.leaves if isinstance(leaf, TensorLeaf)]


_SETTINGS: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    (torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp),
    (torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp),
    (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp),
)
"""Settings of torch on which a trace depends: how to read each, and how to set it."""


def settings() -> tuple[Any, ...]:
    """What torch is set to."""
    return tuple([read() for read, _ in _SETTINGS])


@contextlib.contextmanager
def set_to(wanted: tuple[Any, ...]) -> Generator[None]:
    """Let torch be set as it was at some call, inside the block."""
    before = settings()
    _set(wanted)
    try:
        yield
    finally:
        _set(before)


def _set(wanted: tuple[Any, ...]) -> None:
    for (read, put), value in zip(_SETTINGS, wanted, strict=True):
        if read() != value:
            put(value)
