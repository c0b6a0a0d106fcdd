"""A hook that a step calls where the plain model would."""

import contextlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fxzero import torch_internals
from fxzero.capture.writes import Output, Template
from fxzero.errors import CaptureError

_muted: list[None] = []
"""Not empty while a step runs again what it ran before."""


@contextlib.contextmanager
def no_hooks() -> Generator[None]:
    """Call no hooks in the block, which repeats a forward whose hooks have run."""
    _muted.append(None)
    try:
        yield
    finally:
        _muted.pop()


def name_of(hook: Callable[..., Any]) -> str:
    """The name of a hook."""
    return getattr(hook, "__qualname__", type(hook).__name__)


@dataclass(frozen=True)
class HookModes:
    """The modes of torch in which a hook runs."""

    grad: bool
    autocast: tuple[str, torch.dtype] | None
    """The type of device, and the dtype, for which autocast is on."""

    @classmethod
    def now(cls, device_type: str) -> "HookModes":
        """The present modes."""
        is_on = torch.is_autocast_enabled(device_type)
        return cls(torch.is_grad_enabled(), (device_type, torch.get_autocast_dtype(device_type)) if is_on else None)

    @contextlib.contextmanager
    def on(self) -> Generator[None]:
        """Switch them on."""
        with contextlib.ExitStack() as stack:
            if self.autocast is not None:
                device_type, dtype = self.autocast
                stack.enter_context(torch.autocast(device_type, dtype=dtype))
            if self.grad != torch.is_grad_enabled():
                stack.enter_context(torch.set_grad_enabled(self.grad))
            yield


@dataclass(frozen=True)
class Lent:
    """A parameter or a buffer that a hook reads in a module, which holds another tensor while a step runs."""

    table: dict[str, Any]
    key: str
    index: int
    """Of its value, among the tensors that the hook gets."""
    is_trained: bool | None
    """Of a parameter, whether it requires grad; None for a buffer."""


@dataclass(eq=False, repr=False)
class Observer:
    """A hook that leaves alone what a step computes."""

    hook: Callable[..., Any]
    arguments: Template
    """With an Output in the place of each tensor that the step computes."""
    modes: HookModes
    attached: frozenset[int] = frozenset()
    """Indices of tensors through which the plain model could be differentiated."""
    lent: tuple[Lent, ...] = ()
    refreshed: set[int] = field(default_factory=set[int])
    """Indices of tensors that the forward writes in place later; the hook gets copies, which follow."""
    given: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    """These copies, until the end of forward."""

    def __repr__(self) -> str:
        return f"<hook {name_of(self.hook)}>"

    def run(self, tensors: Sequence[Any]) -> None:
        """Call the hook, unless a tensor that it observes was not computed.

        Args:
            tensors: what the step computed.

        Raises:
            CaptureError: the hook returns a value, or writes into a tensor, which would change what the step computes.
        """
        read = [leaf.index for leaf in self.arguments.leaves if isinstance(leaf, Output)]
        if _muted or any(tensors[index] is None for index in read):
            return
        given = list(tensors)
        for index in self.refreshed:
            given[index] = self.given[index] = given[index].clone()
        for index in self.attached:
            given[index] = _without_gradient(given[index], name_of(self.hook))
        watched = [given[index] for index in read if not given[index].is_inference()]
        changes = torch_internals.num_changes(watched)
        try:
            with self.modes.on(), self._lending(given):
                result = self.hook(*self.arguments.filled(given))
        except RuntimeError as error:
            if "leaf Variable that requires grad is being used in an in-place" in str(error):
                raise self._writes() from error
            raise
        if result is not None:
            raise CaptureError(
                f"The hook {name_of(self.hook)} returns a value that depends on the values of tensors. Compute the "
                "value with tensor operations, or return None."
            )
        if torch_internals.num_changes(watched) != changes:
            raise self._writes()

    def _writes(self) -> CaptureError:
        return CaptureError(
            f"The hook {name_of(self.hook)} writes into a tensor, depending on the values of tensors. Compute what it "
            "writes with tensor operations alone (torch.where)."
        )

    @contextlib.contextmanager
    def _lending(self, given: Sequence[Tensor]) -> Generator[None]:
        """Let modules hold the values of parameters and buffers that the hook reads there."""
        before = [(each.table, each.key, each.table[each.key]) for each in self.lent]
        for each in self.lent:
            value = given[each.index]
            each.table[each.key] = value if each.is_trained is None else nn.Parameter(value, each.is_trained)
        try:
            yield
        finally:
            for table, key, value in before:
                table[key] = value


@dataclass(eq=False, repr=False)
class Refresh:
    """Brings what a hook got up to date, behind a write in place."""

    observer: Observer
    indices: tuple[int, ...]

    def __repr__(self) -> str:
        return f"<refresh of {self.observer}>"

    def run(self, tensors: Sequence[Tensor]) -> None:
        """Copy new values into what the hook got.

        Args:
            tensors: the values, in the order of the indices.
        """
        for index, tensor in zip(self.indices, tensors, strict=True):
            if index in self.observer.given:
                self.observer.given[index].copy_(tensor)


@dataclass(eq=False, repr=False)
class Forget:
    """Lets go of the copies that hooks got, at the end of forward."""

    observers: Sequence[Observer]

    def __repr__(self) -> str:
        return "<end of copies>"

    def run(self, tensors: Sequence[Tensor]) -> None:
        """Forget them."""
        for observer in self.observers:
            observer.given.clear()


def _without_gradient(tensor: Tensor, name: str) -> Tensor:
    """An equal tensor that requires grad, and refuses a backward, which would end there."""
    with torch.enable_grad():
        kept = tensor.detach().requires_grad_()
        kept.register_hook(partial(_refuse_backward, name))
        return kept


def _refuse_backward(name: str, grad: Tensor) -> None:
    raise CaptureError(
        f"A gradient is asked for through a tensor that the hook {name} got and kept where no trace sees it. Let the "
        "hook keep it in an attribute, a list or a dict, before it reads values; or return it from forward."
    )
