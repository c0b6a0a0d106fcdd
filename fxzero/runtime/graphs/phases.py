"""Forward and backward of one executable as CUDA graphs: captured once, and replayed by later steps.

    call       inputs --copy--> | forward graph  | --clone--> outputs
                                |  saved values  |
    backward   grads  --copy--> | backward graph | --clone--> gradients of inputs, and `.grad` where it always lies

A capture runs the generated code once, on a stream that only takes notes; the replay behind it computes. All graphs
of an executable share a pool of memory. The values that forward saves stay there between the two replays, so a second
forward that comes before the backward of the first runs without graphs, as do gradients with other strides than traced.

event      legal                              what it does
forward    outside a phase                    replays, and captures first where the graph is new or addresses changed
backward   behind forward, with its `saved`   the same; a backward of another forward's values runs as it is
drop       outside a phase                    frees the graphs; the next forward captures again
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

import torch
from torch import fx

from fxzero.graph.step import StepGraph
from fxzero.graph.variant import Variant
from fxzero.runtime.graphs.returned import Returned, kept
from fxzero.runtime.graphs.watch import ReplayWatch
from fxzero.runtime.storage import Arena

Functions: TypeAlias = Mapping[str, Callable[..., Any]]
"""What `Binder.bind` returns."""


class Saved(list[Any]):
    """What a replayed forward has saved; while it lives, its backward may come."""


@dataclass
class Recorded:
    """One phase as a graph."""

    graph: Any
    given: list[torch.Tensor]
    """The memory that it reads its arguments from."""
    returned: tuple[Any, ...]
    """What it returns, in the memory of the graph."""
    saved: Sequence[Any] = ()
    """What a forward saves: held, since each backward is captured on the same memory."""
    backwards: dict[Variant, "Recorded"] = field(default_factory=dict[Variant, "Recorded"])

    def fits(self, values: Sequence[torch.Tensor]) -> bool:
        """True if values have the geometry that was captured."""
        return all(
            value.shape == into.shape and value.stride() == into.stride()
            for into, value in zip(self.given, values, strict=True)
        )


class PhaseGraphs:
    """See the table in the module docstring.

    Args:
        step: the graph of the executable, which has no `obstacle`.
        arena: whose addresses the graphs have.
        cuda: `torch.cuda`, or what looks like it.
        watch: sees to it that waits for replays end; None where no rank waits for another.
        on_failure: called with the error of a capture that failed: it raises, or all runs as it is from then on.
    """

    def __init__(
        self,
        step: StepGraph,
        arena: Arena,
        device: torch.device,
        cuda: Any,
        watch: ReplayWatch | None,
        on_failure: Callable[[RuntimeError], object],
    ) -> None:
        self._arena, self._device, self._cuda, self._watch = arena, device, cuda, watch
        self._on_failure, self._is_broken = on_failure, False
        self._returned = Returned.of(step)
        self._generators = _generators(step)
        self._pool: Any = None
        self._forwards: dict[str, Recorded] = {}
        self._addresses: tuple[int, ...] = ()
        """Of what may move: buffers that a user replaces, and the arena as it grows."""
        self._waiting: tuple[Recorded, weakref.ref[Saved]] | None = None
        """The forward that was replayed last, until its backward."""
        self.num_captures = self.num_replays = 0

    def forward(
        self, functions: Functions, name: str, inputs: list[torch.Tensor], buffers: list[torch.Tensor]
    ) -> tuple[tuple[Any, ...], list[Any]]:
        """Run a forward phase, as `functions[name]` does."""
        if self._is_broken or (self._waiting is not None and self._waiting[1]() is not None):
            return functions[name](inputs, buffers)
        addresses = (self._arena.num_grown, *[buffer.data_ptr() for buffer in buffers])
        if addresses != self._addresses:
            self.drop()
            self._addresses = addresses
        recorded = self._forwards.get(name) or self._capture_forward(functions, name, inputs, buffers)
        if recorded is None or not recorded.fits(inputs):
            return functions[name](inputs, buffers)
        self._forwards[name] = recorded
        self._replay(recorded, inputs)
        saved = Saved(recorded.saved)
        self._waiting = recorded, weakref.ref(saved)
        return self._returned.outputs(recorded.returned, inputs), saved

    def backward(
        self, variant: Variant, functions: Functions, saved: list[Any], tangents: list[torch.Tensor]
    ) -> tuple[Any, ...]:
        """Run a backward phase, as `functions["backward"]` does; empties both lists."""
        waiting = self._waiting
        if waiting is None or waiting[1]() is not saved:
            return functions["backward"](saved, tangents)
        forward, self._waiting = waiting[0], None
        recorded = forward.backwards.get(variant) or self._capture_backward(functions, forward, tangents)
        if recorded is None or not recorded.fits(tangents):
            return functions["backward"](saved, tangents)
        forward.backwards[variant] = recorded
        self._replay(recorded, tangents)
        saved.clear()
        tangents.clear()
        return tuple(map(kept, recorded.returned))

    def drop(self) -> None:
        """Free the graphs, once all that was launched is done."""
        if not self._forwards:
            return
        self._cuda.synchronize(self._device)
        for forward in self._forwards.values():
            for recorded in (forward, *forward.backwards.values()):
                recorded.graph.reset()
        self._forwards.clear()
        self._addresses, self._pool = (), None

    def _capture_forward(
        self, functions: Functions, name: str, inputs: list[torch.Tensor], buffers: list[torch.Tensor]
    ) -> Recorded | None:
        given = [_copy_of(value) for value in inputs]
        captured = self._capture(functions, lambda: functions[name](list(given), buffers))
        return captured and Recorded(captured[0], given, *captured[1])

    def _capture_backward(
        self, functions: Functions, forward: Recorded, tangents: list[torch.Tensor]
    ) -> Recorded | None:
        given = [_copy_of(value) for value in tangents]
        backward = functions["backward"]
        captured = self._capture(functions, lambda: backward(list(forward.saved), list(given)))
        return captured and Recorded(captured[0], given, captured[1])

    def _capture(self, functions: Functions, run: Callable[[], Any]) -> tuple[Any, Any] | None:
        """Capture a phase: the communication stream branches off at its beginning, and comes back at its end.

        Returns:
            The graph and what the phase returned; None if that failed, for which nothing has run.
        """
        cuda = self._cuda
        if self._pool is None:
            self._pool = cuda.graph_pool_handle()
        graph = cuda.CUDAGraph()
        for generator in self._generators:
            graph.register_generator_state(generator)
        try:
            stream = cuda.Stream(device=self._device)
            with cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                functions["fork"]()
                result = run()
                functions["join"]()
        except RuntimeError as error:
            self._is_broken = True
            self._on_failure(error)
            return None
        self.num_captures += 1
        return graph, result

    def _replay(self, recorded: Recorded, values: Sequence[torch.Tensor]) -> None:
        watch = self._watch
        if watch is not None:
            watch.before_replay()
        with torch.no_grad() if torch.is_grad_enabled() else nullcontext():
            for into, value in zip(recorded.given, values, strict=True):
                into.copy_(value)
        recorded.graph.replay()
        self.num_replays += 1
        if watch is not None:
            watch.after_replay()


def _copy_of(value: torch.Tensor) -> torch.Tensor:
    memory = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    return memory.copy_(value.detach())


def _generators(step: StepGraph) -> list[torch.Generator]:
    """The generators that a step draws from, beside the default one, which a capture knows."""
    found: dict[int, torch.Generator] = {}
    for node in step.graph.nodes:
        for value in cast("tuple[fx.Node, ...]", (*node.args, *node.kwargs.values())):
            if isinstance(value, torch.Generator):
                found[id(value)] = value
    return list(found.values())
