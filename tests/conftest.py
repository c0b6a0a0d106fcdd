"""Fixtures that several modules of tests use."""

import gc
from collections.abc import Iterator

import pytest

from fxzero.memory import activations


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
