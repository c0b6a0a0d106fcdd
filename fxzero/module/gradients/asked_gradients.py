"""`torch.autograd.grad(loss, zero.parameters())`: gradients that are asked for, which leaves `.grad` alone.

Autograd knows of no way from an output to a parameter: a step is one node, whose only edge beside the inputs leads to
an anchor. So the anchor is asked for in the place of parameters, and a backward that runs then hands over its shards.
"""

import functools
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor

from fxzero import torch_internals
from fxzero.errors import StaleBackwardError
from fxzero.module.call import Call
from fxzero.module.engine import Engine

_engines: weakref.WeakSet[Engine] = weakref.WeakSet()
_UNUSED = (
    "One of the differentiated Tensors appears to not have been used in the graph. Set allow_unused=True if this is "
    "the desired behavior."
)
"""The text of torch."""


def watch_gradients(engine: Engine) -> None:
    """Let torch.autograd.grad take the parameters of a compiled model."""
    _install()
    _engines.add(engine)


@functools.cache
def _install() -> None:
    """One function serves all models, and is never removed."""
    torch_internals.wrap_engine_run(_run)


def _run(
    run: Callable[..., Any], outputs: Any, grads: Any, retain: Any, create: Any, inputs: Any, *rest: Any, **kw: Any
) -> Any:
    """What runs the autograd engine, in the place of torch's own function of these arguments."""
    if inputs:
        _check_outputs(outputs, inputs)
    asked = dict(_asked(inputs)) if inputs else {}
    if not asked:
        return run(outputs, grads, retain, create, inputs, *rest, **kw)
    if kw.get("accumulate_grad", True):
        raise StaleBackwardError(
            "backward(inputs=...) names parameters of a compiled module, whose backward gives gradients to all. "
            "Call backward() without inputs, or torch.autograd.grad, which leaves .grad alone."
        )
    allow_unused = rest[0]
    anchors = {id(engine.anchor): engine.anchor for engine, _ in asked.values()}
    others = [index for index in range(len(inputs)) if index not in asked]
    wanted = (*(inputs[index] for index in others), *anchors.values())
    with _asking({engine for engine, _ in asked.values()}):
        found = run(outputs, grads, retain, create, wanted, True, **kw)
        result = dict(zip(others, found, strict=False))
        result |= {index: (engine.asked or {}).get(fqn) for index, (engine, fqn) in asked.items()}
    if not allow_unused and any(each is None for each in result.values()):
        raise RuntimeError(_UNUSED)
    return tuple(result[index] for index in range(len(inputs)))


def _check_outputs(outputs: Sequence[Any], inputs: Sequence[Any]) -> None:
    """Refuse to differentiate by what a call returned, where that call computed other outputs from it.

    Raises:
        FxzeroError: it gave only a part of the gradient.
    """
    for each in inputs:
        node = getattr(each, "grad_fn", None)
        call = getattr(node, "call", None)
        if isinstance(call, Call):
            call.check_asked(each.output_nr, _results_used(node, outputs))


def _results_used(node: Any, outputs: Sequence[Any]) -> set[int]:
    """The results of a node of autograd that tensors were computed from, by number."""
    edges = [(each.grad_fn, each.output_nr) for each in outputs if isinstance(each, Tensor)]
    used, seen = set[int](), set[Any]()
    while edges:
        function, number = edges.pop()
        if function is node:
            used.add(number)
        elif function is not None and function not in seen:
            seen.add(function)
            edges += function.next_functions
    return used


def _asked(inputs: Sequence[Any]) -> Iterator[tuple[int, tuple[Engine, str]]]:
    """The index of each input that is a parameter of a compiled model, with the engine of the model and its name."""
    for engine in _engines:
        sharded = engine.sharded
        if not sharded.ids.isdisjoint(map(id, inputs)):
            names = {id(param): fqn for fqn, param in sharded.params.items() if fqn not in sharded.whole}
            yield from ((i, (engine, names[id(each)])) for i, each in enumerate(inputs) if id(each) in names)


@contextmanager
def _asking(engines: set[Engine]) -> Generator[None]:
    """Let backwards of these models inside of the block hand over their gradients."""
    with ExitStack() as stack:
        for engine in engines:
            stack.callback(setattr, engine, "asked", engine.asked)
            engine.asked = dict[str, Tensor]()
        yield
