"""Regions of fused compute that run operator by operator, so that tests of plans need no compiler."""

from collections.abc import Generator
from contextlib import contextmanager
from unittest.mock import patch

from torch import fx

from fxzero.graph.regions import Region, is_region, region_of
from fxzero.graph.step import StepGraph
from fxzero.planning import compile_regions


@contextmanager
def uncompiled() -> Generator[None]:
    """Let regions run their operators one by one inside the block."""
    with (
        patch.object(compile_regions, "_compile", lambda region: region),
        patch.dict(compile_regions._compiled, clear=True),
    ):
        yield


def calls_of_regions(step: StepGraph) -> list[fx.Node]:
    """The nodes that call regions, in order."""
    return [node for node in step.graph.nodes if is_region(node)]


def regions(step: StepGraph) -> list[Region]:
    """What they call."""
    return [region_of(call) for call in calls_of_regions(step)]
