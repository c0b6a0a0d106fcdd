"""Fixtures that several modules of tests use."""

import gc
import os
from collections.abc import Iterator

import pytest

from fxzero.memory import activations

os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")
"""torch asks the DNS for the name of 127.0.0.1 at both ends of each connection to a store: a lost answer costs 5 s."""


def pytest_collection_finish() -> None:
    """Spare each garbage collection of a test a walk through the objects of torch and of pytest."""
    gc.freeze()


@pytest.fixture(scope="module")
def every_temporary_has_a_place() -> Iterator[None]:
    """Temporaries of any size have a place in the arena, as only large ones have outside of tests."""
    limit = activations.PLACED_FROM_BYTES
    activations.PLACED_FROM_BYTES = 1
    yield
    activations.PLACED_FROM_BYTES = limit
