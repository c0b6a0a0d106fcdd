"""With FXZERO_CHECK=1, run the graph after each pass and compare its results with those of the graph before the pass.

    capture          run on the example: outputs, gradients, input gradients, buffers, random state
    pass 1           run again: results are equal, bit for bit
    ...              a pass with a `tolerance` may change numbers as far as the tolerance allows
    pass 5           results differ: PassChangedNumbersError names the pass, the value and the first operator

Each graph runs on one rank, at the full size of the model, whatever the world size of the plan; see `run_step.py`.
"""

import logging
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxzero.capture.call import flatten_call
from fxzero.errors import PassChangedNumbersError
from fxzero.graph.regions import is_region, region_inputs, region_of, region_places
from fxzero.graph.step import Pass, StepGraph, copy_of
from fxzero.planning.compare_results import differences, nan_throughout
from fxzero.planning.compile_regions import compiled
from fxzero.planning.example_values import example_values
from fxzero.planning.run_passes import Observer, add_note
from fxzero.planning.run_step import Results, copy_of_tensor, describe_operator, run_step
from fxzero.torch_internals import tree_leaves

logger = logging.getLogger(__name__)

VARIABLE = "FXZERO_CHECK"
ROUNDINGS = 4
"""A pass that may change numbers at all may change them by so many roundings of the coarsest dtype."""


def pass_checks(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], passes: Sequence[Pass]
) -> list[Observer]:
    """The observers that the variable FXZERO_CHECK asks for, for one plan of a call of a model.

    Args:
        args, kwargs: the arguments of the call that was captured.
        passes: the passes that will run.

    Raises:
        ValueError: FXZERO_CHECK has another value than 1, 0 or none.
    """
    value = os.environ.get(VARIABLE, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"{VARIABLE} is {value!r}; it must be 1 to run the result of each pass, or 0 or empty")
    return [CheckPasses(passes, model, flatten_call(args, kwargs)[0])] if value == "1" else []


class CheckPasses:
    """An observer of `run_passes` that runs each graph on the example, and refuses the first pass that changes results.

    A value that already differs between two runs of the captured graph is not compared: operators on a GPU may add in
    any order.

    Args:
        passes: the passes that will run.
        model: the model whose call was captured.
        inputs: the tensors of the call.

    Raises:
        PassChangedNumbersError: when called after a pass that changed numbers.
        RuntimeError: when called with a captured graph that cannot be run.
    """

    def __init__(self, passes: Sequence[Pass], model: nn.Module, inputs: Sequence[Tensor]) -> None:
        self._tolerances = [float(getattr(each, "tolerance", 0.0)) for each in passes]
        self._model, self._inputs = model, inputs
        self._values: dict[str, Any] = {}
        """The tensor that each placeholder is fed, by the name of its node."""
        self._step: StepGraph | None = None
        """A copy of the graph before the next pass."""
        self._results: Results = {}
        """The results of that graph."""
        self._unsteady: set[str] = set()
        """The names of values that are not compared."""
        self._seconds = 0.0
        """Time that all checks of the present plan took."""

    def __call__(self, index: int, name: str, step: StepGraph) -> None:
        begin = time.perf_counter()
        if index == 0:
            self._seconds = 0.0
            self._run_capture(step)
        else:
            self._compare(index, name, step)
        self._step = copy_of(step)
        self._seconds += time.perf_counter() - begin
        if index == len(self._tolerances):
            logger.info("%s: %d passes checked in %.2f s", VARIABLE, index, self._seconds)

    def _run_capture(self, step: StepGraph) -> None:
        self._values = example_values(step, self._model, self._inputs)
        try:
            self._results = run_step(step, self._values)
        except RuntimeError as error:
            add_note(error, f"{VARIABLE}=1 ran the captured graph, before any pass, on the example. 0 checks nothing.")
            raise
        self._unsteady = {what for what, _ in differences(self._results, run_step(step, self._values))}
        for what in sorted(self._unsteady):
            logger.warning("%s: %s is not compared: it differs between two runs of one graph.", VARIABLE, what)
        for what in nan_throughout(self._results):
            logger.warning("%s: %s is NaN throughout on the example, which hides differences.", VARIABLE, what)

    def _compare(self, index: int, name: str, step: StepGraph) -> None:
        tolerance = self._tolerances[index - 1]
        if tolerance:
            tolerance = max(tolerance, ROUNDINGS * _coarsest_rounding(step))
        which = f"Pass {index} of {len(self._tolerances)}, {name}, "
        try:
            results = run_step(step, self._values)
        except RuntimeError as error:
            raise PassChangedNumbersError(f"{which}left a graph that cannot be run: {error}") from error
        for what, how in differences(self._results, results, tolerance):
            if what in self._unsteady:
                continue
            node = self._first_node(step, tolerance)
            where = "All nodes that were there before have the same values: it lies in others, or in who reads which."
            if node is not None:
                where = f"The first node that was there before and has another value is {describe_operator(node)}."
            raise PassChangedNumbersError(
                f"{which}changed numbers: {what} {how}.\n{where}\n"
                "FXZERO_DUMP=dir writes what the pass changed in the schedule."
            )
        self._results = results
        assert self._step is not None
        if any(map(is_region, step.graph.nodes)) and not any(map(is_region, self._step.graph.nodes)):
            self._check_regions(step, tolerance, which)

    def _check_regions(self, step: StepGraph, tolerance: float, which: str) -> None:
        """Compare what is compiled of each region with its operators, which `run_step` runs one by one."""
        values: dict[fx.Node, Any] = {}

        def compare(node: fx.Node, value: Any) -> None:
            values[node] = value
            if not is_region(node):
                return
            places = [values[place] for place in region_places(node)]
            own = [torch.empty_like(place) for place in places]
            results = compiled(region_of(node))([*(values[source] for source in region_inputs(node)), *own])
            for _, how in differences(_copies([*value, *places]), _copies([*results, *own]), tolerance):
                raise PassChangedNumbersError(
                    f"{which}made a region that is compiled wrong: a result of {describe_operator(node)} {how}."
                )

        run_step(step, self._values, compare)

    def _first_node(self, step: StepGraph, tolerance: float) -> fx.Node | None:
        """The first node of `step` whose value differs from that of the node of this name in the graph before."""
        names = {node.name for node in step.graph.nodes if node.op != "output"}
        before: dict[str, Results] = {}
        found: list[fx.Node] = []

        def keep(node: fx.Node, value: Any) -> None:
            if node.name in names:
                before[node.name] = _copies(value)

        def compare(node: fx.Node, value: Any) -> None:
            if not found and node.name in before and any(differences(before.pop(node.name), _copies(value), tolerance)):
                found.append(node)

        assert self._step is not None
        run_step(self._step, self._values, keep)
        run_step(step, self._values, compare)
        return next(iter(found), None)


def _coarsest_rounding(step: StepGraph) -> float:
    """The largest rounding of a number, relative to it, among the floating dtypes of a step."""
    values = (node.meta.get("val") for node in step.graph.nodes)
    dtypes = {value.dtype for value in values if isinstance(value, Tensor) and value.is_floating_point()}
    return max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)


def _copies(value: Any) -> Results:
    """Copies of the tensors in the value of one node, in the form that `differences` takes."""
    tensors = [copy_of_tensor(leaf) for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return {"value": {str(index): tensor for index, tensor in enumerate(tensors)}}
