"""Regions of fused compute as machine code, each distinct one compiled once for the whole process.

Inductor compiles them, and keeps what it compiled on disk. A region that it cannot compile runs operator by operator,
and so does one of exact compute whose code differs from its operators in a bit on this device. Ranks need not agree on
that: both compute the same.
"""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

from fxzero import torch_internals
from fxzero.errors import FxzeroError
from fxzero.graph.regions import Region, is_region, region_of
from fxzero.graph.step import StepGraph
from fxzero.planning.probe_regions import differs

logger = logging.getLogger(__name__)

Compiled: TypeAlias = Callable[[list[Any]], Sequence[Any]]
"""Takes the inputs and the places of a region as a list, which it may empty; returns the results without places."""

_compiled: dict[str, Compiled] = {}
"""By the key of the region."""


def compiled(region: Region) -> Compiled:
    """The machine code of a region; the region itself if it cannot be compiled."""
    if region.key not in _compiled:
        _compiled[region.key] = _compile(region)
    return _compiled[region.key]


def compile_regions(steps: Iterable[StepGraph]) -> None:
    """Compile the regions of some steps that are not yet compiled, with a log line if there are any."""
    regions = {region_of(node).key: region_of(node) for step in steps for node in step.graph.nodes if is_region(node)}
    new = [region for key, region in regions.items() if key not in _compiled]
    if not new:
        return
    began = time.perf_counter()
    inexact = sum(compiled(region) is region and region.exact for region in new)
    took = time.perf_counter() - began
    logger.info("%d of %d distinct regions compiled in %.1f s", len(new), len(regions), took)
    if inexact:
        logger.info("%d of %d exact regions run operator by operator on this device", inexact, len(new))


def _compile(region: Region) -> Compiled:
    try:
        code = torch_internals.compile_graph(region.body, region.examples, region.placed)
        how = differs(region, code) if region.exact else None
        if how is None:
            return code
        logger.debug("a region of %d operators runs one by one: %s", region.num_ops, how)
        return region
    except FxzeroError:
        raise
    except Exception as error:
        logger.debug("a region of %d operators runs one by one: %s", region.num_ops, error)
        return region
