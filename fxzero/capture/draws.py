"""Random draws of a traced step: equal to those of eager, and made once, also if a checkpoint recomputes them.

A trace draws nothing random, so the seed of the real CPU generator can number the draws: each draw takes the present
seed as its key, and sets the next seed. torch.utils.checkpoint saves the generator's state in forward and restores it
around the recomputation. So a recomputed draw has the key of the draw in forward, and reads its result instead of
drawing again. With preserve_rng_state=False, checkpoint restores nothing; the recomputation draws anew, as in eager.
"""

import contextlib
import functools
import random
from collections.abc import Callable, Generator, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from fxzero import torch_internals
from fxzero.errors import CaptureError

aten = torch.ops.aten

_FIRST_KEY = 0x66785A6572306B79
"""First key; it is far from any seed that a user's code sets."""

_IDLE_ARGUMENTS = {"dropout_p": (0.0,), "training": (False,), "train": (False,)}
"""Maps arguments to values with which an operator does not draw."""

_Drawn = tuple[list[Tensor], list[Tensor]]
"""The results of an operator that draws, and the values that it wrote into its arguments."""


class PythonDrawError(CaptureError):
    """A forward draws outside of torch."""


class Draws:
    """Runs operators; an operator that draws random numbers draws them once."""

    def __init__(self) -> None:
        self.in_backward = False
        self._recorded: dict[int, tuple[Any, _Drawn]] = {}
        self._calls: set[int] = set()

    def number_call(self) -> int:
        """The key of a call that may draw: that of an earlier one if a checkpoint makes it again.

        Raises:
            CaptureError: the model seeds or restores the generator itself.
        """
        key = self._next_key("an island")
        if key in self._recorded or (key in self._calls and not self.in_backward):
            raise CaptureError(
                "An island draws from a state of the generator that was drawn from before: the forward restores the "
                "generator. Only torch.utils.checkpoint may do so."
            )
        self._calls.add(key)
        return key

    def run(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of `op`: computed, drawn now, or drawn before."""
        if not _may_draw(op):
            return op(*args, **kwargs)
        arguments = torch_internals.named_arguments(op, args, kwargs)
        if any(isinstance(value, torch.Generator) for value in arguments.values()):
            raise CaptureError(
                f"{op} draws from a torch.Generator of its own, whose state a compiled step cannot follow. "
                "Draw from the default generator (no generator=), or draw before the call and pass the tensor in."
            )
        if _is_idle(arguments):
            return op(*args, **kwargs)
        if op is aten.native_dropout.default:
            return self._fused_dropout(*args, **kwargs)
        return self._draw(op, args, kwargs, [arguments[name] for name in torch_internals.written_names(op)])

    def _draw(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], written: list[Tensor]) -> Any:
        result: Any = None

        def draw() -> _Drawn:
            nonlocal result
            result = op(*args, **kwargs)
            outputs = [result] if isinstance(result, Tensor) else list(result)
            return outputs, [aten.clone.default(tensor) for tensor in written]

        outputs, values = self._once(op, draw)
        if result is not None:
            return result
        for tensor, value in zip(written, values, strict=True):
            aten.copy_.default(tensor, value)
        if torch_internals.returns_an_argument(op):  # as bernoulli_ does
            return written[0]
        fresh = [aten.alias.default(output) for output in outputs]
        return fresh[0] if torch_internals.num_results(op) == 1 else tuple(fresh)

    def _fused_dropout(self, x: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
        """CUDA's dropout. Its forward and its backward compute x * mask * scale, so only the mask is recorded."""
        op = aten.native_dropout.default
        fresh: list[tuple[Tensor, Tensor]] = []

        def draw() -> _Drawn:
            fresh.append(op(x, p, train))
            return [fresh[0][1]], []

        (mask,), _ = self._once(op, draw)
        if fresh:
            return fresh[0]
        return aten.native_dropout_backward.default(x, mask, 1 / (1 - p)), aten.alias.default(mask)

    def _once(self, op: Any, draw: Callable[[], _Drawn]) -> _Drawn:
        """The result of `draw`, or the recorded one if there was a draw in this state of the generator."""
        key = self._next_key(op)
        if key not in self._recorded:
            self._recorded[key] = op, draw()
        elif not self.in_backward or self._recorded[key][0] is not op:
            raise CaptureError(
                f"{op} draws from a state of the generator that {self._recorded[key][0]} drew from before, but is not "
                "its recomputation: the forward restores the generator. Only torch.utils.checkpoint may do so."
            )
        return self._recorded[key][1]

    def _next_key(self, what: Any) -> int:
        """The key of a draw that begins; the generator has that of the next one afterwards."""
        key = torch.default_generator.initial_seed()
        if not _FIRST_KEY <= key <= _FIRST_KEY + len(self._recorded) + len(self._calls):
            raise CaptureError(
                f"The model seeds the random generator before {what}; a compiled step draws from the one generator "
                "that goes on from step to step. Seed before the training loop, not in forward."
            )
        torch.default_generator.manual_seed(key + 1)
        return key


def draws(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """True if a call of an operator draws."""
    return _may_draw(op) and not _is_idle(torch_internals.named_arguments(op, args, kwargs))


@functools.cache
def _may_draw(op: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in op.tags


def _is_idle(arguments: dict[str, Any]) -> bool:
    return any(arguments.get(name) in idle for name, idle in _IDLE_ARGUMENTS.items())


def python_states(others: Sequence[Any] = ()) -> tuple[Any, ...]:
    """What tells whether anybody has drawn from Python's generator, from numpy's, or from other objects of theirs."""
    of_numpy = cast("tuple[Any, ...]", np.random.get_state())
    states = (random.getstate(), (of_numpy[1].tobytes(), *of_numpy[2:]))
    return (*states, *(e.getstate() if isinstance(e, random.Random) else repr(e.bit_generator.state) for e in others))


def generators_of(module: nn.Module) -> list[Any]:
    """Generators of Python and numpy that a module and its parts hold in attributes."""
    held = [value for part in module.modules() for value in vars(part).values()]
    return [each for each in held if isinstance(each, (random.Random, np.random.Generator))]


@contextlib.contextmanager
def no_draws_of_python(others: Sequence[Any] = ()) -> Generator[None]:
    """Refuse draws outside of torch, which would be constants of the step, and restore the generators.

    Args:
        others: generators that the model holds.

    Raises:
        CaptureError: the block drew from Python's generator, from numpy's, or from one of the model's.
    """
    states = python_states(others)
    with same_draws_of_python(others):
        yield
        now = python_states(others)
    if now == states:
        return
    names = ["random", "numpy.random", *("a generator of the model's own" for _ in others)]
    drawn = next(name for name, a, b in zip(names, states, now, strict=True) if a != b)
    raise PythonDrawError(
        f"The forward draws from {drawn}, outside of torch: every step would use the value drawn at its trace. Draw "
        "with torch (torch.rand), or before the call, and pass the value in."
    )


def restoring(generator: Any) -> Callable[[], object] | None:
    """What gives a generator of torch, Python or numpy its present state again; None for any other object."""
    if isinstance(generator, torch.Generator):
        return functools.partial(generator.set_state, generator.get_state())
    if isinstance(generator, random.Random):
        return functools.partial(generator.setstate, generator.getstate())
    if isinstance(generator, np.random.Generator):
        return functools.partial(setattr, generator.bit_generator, "state", generator.bit_generator.state)
    return None


@contextlib.contextmanager
def same_draws_of_python(others: Sequence[Any] = ()) -> Generator[None]:
    """Restore Python's generator, numpy's, and other objects of theirs after the block."""
    state, numpy_state = random.getstate(), np.random.get_state()
    undo = [restore for each in others if (restore := restoring(each)) is not None]
    try:
        yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)
        for restore in undo:
            restore()


def restoring_all(device: torch.device, others: Sequence[Any] = ()) -> Callable[[], None]:
    """What gives the generators of torch, Python and numpy their present states again.

    Args:
        device: the one beside the CPU whose generator counts.
        others: objects, of which generators count too.
    """
    state, num_cpu_bytes = rng_state(device), torch.get_rng_state().numel()
    of_python, of_numpy = random.getstate(), np.random.get_state()
    undo = [restore for each in others if (restore := restoring(each)) is not None]

    def restore_all() -> None:
        torch.set_rng_state(state[:num_cpu_bytes].clone())
        if device.type != "cpu":
            torch.get_device_module(device).set_rng_state(state[num_cpu_bytes:].clone(), device)
        random.setstate(of_python)
        np.random.set_state(of_numpy)
        for restore in undo:
            restore()

    return restore_all


def rng_state(device: torch.device | str) -> Tensor:
    """The state of the CPU's generator, followed by that of `device` if it has a generator of its own.

    Returns:
        A uint8 tensor on the CPU; on the CPU device it is `torch.get_rng_state()`.
    """
    where = torch.device(device)
    states = [torch.get_rng_state()]
    if where.type != "cpu":
        states.append(torch.get_device_module(where).get_rng_state(where).cpu())
    return torch.cat(states)


@contextlib.contextmanager
def drawing_from(state: Tensor, device: torch.device) -> Generator[None]:
    """Draw from a state that `rng_state(device)` returned; afterwards the generators are as they were before."""
    num_cpu_bytes = torch.get_rng_state().numel()
    beside_cpu = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(beside_cpu, device_type=device.type):
        torch.set_rng_state(state[:num_cpu_bytes].clone())
        for other in beside_cpu:
            torch.get_device_module(other).set_rng_state(state[num_cpu_bytes:].clone(), other)
        yield


@contextlib.contextmanager
def numbered_draws() -> Generator[None]:
    """Let the CPU generator number draws inside the block, and restore it."""
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(_FIRST_KEY)
    try:
        yield
    finally:
        torch.default_generator.set_state(state)
