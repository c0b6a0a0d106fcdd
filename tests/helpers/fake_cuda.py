"""`torch.cuda` as far as graphs and events go, on the CPU: a capture notes operators, and a replay runs them again.

As on a GPU, a capture leaves memory and generators as they were, and results of a replay lie where those of the capture
lay. What a capture would not allow on a GPU it does not notice.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, torch.Tensor)]


class _Tape(TorchDispatchMode):
    """Notes every operator, and what memory was before one wrote into it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], Any, Any, Any]] = []
        self.before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self.made: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            for tensor in _tensors((args, kwargs)):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.made:
                    self.before.setdefault(storage.data_ptr(), (storage, storage.clone()))
        out = func(*args, **kwargs)
        known = {each.untyped_storage().data_ptr() for each in _tensors((args, kwargs))}
        self.made |= {each.untyped_storage().data_ptr() for each in _tensors(out)} - known
        self.calls.append((func, args, kwargs, out))
        return out


class FakeCudaGraph:
    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda, self.calls = cuda, list[Any]()
        self.generators = list[torch.Generator]()

    def register_generator_state(self, generator: torch.Generator) -> None:
        self.generators.append(generator)

    def replay(self) -> None:
        self._cuda.log.append("replay")
        with torch.no_grad():
            for func, args, kwargs, out in self.calls:
                again = func(*args, **kwargs)
                for into, value in zip(_tensors(out), _tensors(again), strict=True):
                    if into.data_ptr() != value.data_ptr():
                        into.copy_(value)

    def reset(self) -> None:
        self._cuda.log.append("reset")
        self.calls.clear()


class FakeCuda:
    """See the module docstring.

    Args:
        fails: the text of the error in which each capture ends.
    """

    def __init__(self, fails: str = "") -> None:
        self.log: list[str] = []
        self.fails = fails
        self.is_stuck = False
        """True: no event comes."""

    def graph_pool_handle(self) -> tuple[int, int]:
        return (0, 1)

    def CUDAGraph(self) -> FakeCudaGraph:
        return FakeCudaGraph(self)

    def Stream(self, device: Any) -> str:
        return f"a stream of {device}"

    @contextmanager
    def graph(self, graph: FakeCudaGraph, pool: Any, stream: str, capture_error_mode: str) -> Generator[None]:
        assert pool is not None
        assert (stream, capture_error_mode) == ("a stream of cpu", "thread_local")
        self.log.append("capture")
        state = torch.get_rng_state()
        with _Tape() as tape:
            yield
        torch.set_rng_state(state)
        for storage, before in tape.before.values():
            storage.copy_(before)
        if self.fails:
            raise RuntimeError(self.fails)
        graph.calls = tape.calls

    def synchronize(self, device: Any = None) -> None:
        self.log.append("synchronize")

    def Event(self) -> Any:
        cuda = self

        class Event:
            def record(self) -> None:
                cuda.log.append("record")

            def query(self) -> bool:
                return not cuda.is_stuck

        return Event()
