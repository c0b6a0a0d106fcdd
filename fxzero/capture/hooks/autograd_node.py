"""What the user's code gets for `tensor.grad_fn` in a trace: hooks that it registers there are watched."""

from collections.abc import Callable
from typing import Any


class HookedNode:
    """An autograd node, but for its hooks.

    Args:
        watched: gives the hook to register in the place of one.
    """

    def __init__(self, node: Any, watched: Callable[[Any], Any]) -> None:
        self._node, self._watched = node, watched

    @classmethod
    def of(cls, node: Any, watched: Callable[[Any], Any]) -> "HookedNode":
        """One whose class has the name of the node's."""
        return type(type(node).__name__, (cls,), {})(node, watched)

    def register_hook(self, hook: Any) -> Any:
        """As of a node."""
        return self._node.register_hook(self._watched(hook))

    def register_prehook(self, hook: Any) -> Any:
        """As of a node."""
        return self._node.register_prehook(self._watched(hook))

    @property
    def next_functions(self) -> tuple[Any, ...]:
        """As of a node."""
        following = self._node.next_functions
        return tuple((None if each is None else HookedNode.of(each, self._watched), at) for each, at in following)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._node, name)

    def __eq__(self, other: object) -> bool:
        return self._node == (other._node if isinstance(other, HookedNode) else other)

    def __hash__(self) -> int:
        return hash(self._node)
