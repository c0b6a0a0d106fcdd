"""Results of fake operators, made again where an operator gets arguments of equal geometry.

FakeTensorMode has a cache of its own, but to make a key for it, and a result from it, takes longer than all else that a
rehearsal does. Here keys are plain tuples, and what they leave out (symbolic shapes, complex or sparse tensors, tensors
with known values alone, operators that draw, that write, or whose shapes follow from values) is run as ever.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxzero import torch_internals
from fxzero.capture.draws import draws
from fxzero.capture.repeats.arguments import Arguments, UnknownArgumentError

_NEVER = (
    torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view,
)  # fmt: skip


class KnownResults:
    """The results of one rehearsal.

    Args:
        fake_mode: of its tensors.
    """

    def __init__(self, fake_mode: Any) -> None:
        self._mode = fake_mode
        self._known: dict[Any, tuple[bool, list[Any]] | None] = {}  # operators by id: their own hashes take longer
        """Whether a result lies in the memory of the first tensor, and geometries; None where none is made again."""

    def run(self, op: Any, arguments: Arguments, run: Callable[..., Any]) -> Any:
        """The result of an operator.

        Args:
            run: runs it, where the result is not known.
        """
        args, kwargs = arguments.args, arguments.kwargs
        if not _may_be_known(op) or draws(op, args, kwargs):
            return run(op, args, kwargs)
        try:
            structure, tensors = arguments.structure, arguments.tensors
        except UnknownArgumentError:
            return run(op, args, kwargs)
        geometries = [torch_internals.fake_geometry(each) for each in tensors]
        if None in geometries or all(map(torch_internals.has_known_values, tensors)):
            return run(op, args, kwargs)
        key = id(op), structure, tuple(geometries), torch.get_default_dtype()
        if key not in self._known:
            result = run(op, args, kwargs)
            self._known[key] = _described(op, result, tensors)
            return result
        known = self._known[key]
        if known is None:
            return run(op, args, kwargs)
        is_view, geometries = known
        viewed = tensors[0] if is_view else None
        made = [torch_internals.make_fake(self._mode, each, viewed) for each in geometries]
        return made[0] if torch_internals.num_results(op) == 1 else tuple(made)


@functools.cache
def _may_be_known(op: Any) -> bool:
    if op.namespace != "aten" or "lift" in op.name() or torch_internals.is_mutable(op):
        return False
    return not any(tag in op.tags for tag in _NEVER) and torch_internals.gives_tensors(op)


def _described(op: Any, result: Any, tensors: list[Tensor]) -> tuple[bool, list[Any]] | None:
    """The geometries of results that are new tensors, or of one in the memory of the first tensor of the arguments.

    Some are views that no schema declares (of `_unsafe_view`, say); the storages tell.
    """
    results: list[Any] = [result] if isinstance(result, Tensor) else list(result)
    geometries = [torch_internals.fake_geometry(each) for each in results]
    if not tensors or None in geometries or any(map(torch_internals.has_known_values, results)):
        return None
    if len(results) == 1 and torch_internals.same_storage(results[0], tensors[0]):
        return True, geometries
    storages = {torch_internals.storage_id(each) for each in (*tensors, *results)}
    of_arguments = {torch_internals.storage_id(each) for each in tensors}
    is_new = len(storages) == len(of_arguments) + len(results) and not any(each.storage_offset() for each in results)
    return (False, geometries) if is_new and not torch_internals.is_view_operator(op) else None
