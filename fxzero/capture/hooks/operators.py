"""The operator that stands in a trace for a call of a hook that observes.

A traced graph has its overload, with a number. `bind` replaces it by `ops.observe`, which takes what is to be called;
no step calls the overload.
"""

import itertools
import weakref
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx

from fxzero.graph import ops

_LIBRARY = torch.library.Library("fxzero", "FRAGMENT")
_LIBRARY.define("observe(int number, Tensor[] tensors) -> ()")
OBSERVE = torch.ops.fxzero.observe.default
fx.has_side_effect(OBSERVE)

_numbers = itertools.count()
_called: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def _fake_observe(number: int, tensors: Sequence[Tensor]) -> None:
    pass


torch.library.register_fake("fxzero::observe", _fake_observe, lib=_LIBRARY)


def place(called: Any, tensors: Sequence[Tensor]) -> None:
    """Let each step call `called.run` with these traced tensors, at this place.

    Args:
        called: the caller keeps it until `bind`.
    """
    number = next(_numbers)
    _called[number] = called
    with torch.no_grad():
        OBSERVE(number, list(tensors))


def bind(graph: fx.Graph) -> None:
    """Let the nodes take what they call."""
    for node in graph.find_nodes(op="call_function", target=OBSERVE):
        number, tensors = cast("tuple[int, list[fx.Node]]", node.args)
        node.target, node.args = ops.observe, (_called[number], *tensors)
