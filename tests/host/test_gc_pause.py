import gc
from collections.abc import Generator
from typing import Any

import pytest

from fxzero.host.gc_pause import gc_paused


@pytest.fixture(autouse=True)
def _nothing_is_frozen() -> Generator[None]:
    """The suite freezes what it imports."""
    is_frozen = gc.get_freeze_count() > 0
    gc.unfreeze()
    yield
    if is_frozen:
        gc.freeze()


def _is_old(value: Any) -> bool:
    return any(each is value for each in gc.get_objects(generation=2))


@pytest.mark.parametrize("leaves_old", [False, True])
def test_no_collection_runs_inside_and_what_was_made_may_be_left_old(leaves_old: bool) -> None:
    with gc_paused(leaves_old=leaves_old):
        assert not gc.isenabled()
        with gc_paused():
            made = [[index] for index in range(10)]
        assert not gc.isenabled()
    assert gc.isenabled()
    assert _is_old(made) == leaves_old
    assert gc.get_freeze_count() == 0


def test_what_the_user_has_frozen_does_not_thaw() -> None:
    gc.freeze()
    num_frozen = gc.get_freeze_count()
    with gc_paused(leaves_old=True):
        pass
    assert gc.get_freeze_count() == num_frozen > 0
    gc.unfreeze()


def test_a_collector_that_is_off_stays_off() -> None:
    gc.disable()
    try:
        with gc_paused(leaves_old=True):
            made: list[list[int]] = [[]]
        assert not gc.isenabled()
        assert not _is_old(made)
    finally:
        gc.enable()
