"""What of a model's memory is valid between the phases of its steps."""

import pytest

from fxzero.comm.base import LocalComm
from fxzero.errors import FxzeroError
from fxzero.runtime.in_flight import InFlight

A, B = ("a",), ("b",)


class World:
    """What an InFlight looks at."""

    def __init__(self) -> None:
        self.accumulating, self.stamp = False, (0, 0)
        self.in_flight = InFlight(LocalComm(), lambda: self.accumulating, lambda: self.stamp)

    def forward(self) -> bool:
        """One forward that gathers what is not there; true if all was."""
        there = self.in_flight.begin_forward([A, B])
        self.in_flight.end_forward([A, B])
        return there


def test_buckets_are_there_from_the_second_micro_step_on() -> None:
    world = World()
    assert not world.forward()
    world.accumulating = True  # after a backward
    assert world.forward()
    assert world.forward()
    assert not world.in_flight.begin_forward([("c",)])


def test_buckets_are_old_after_any_change() -> None:
    world = World()
    world.forward()
    world.accumulating = True
    assert world.forward()
    world.stamp = (1, 0)  # a parameter was changed in place
    assert not world.forward()
    assert world.forward()
    world.in_flight.after_step()  # an optimizer stepped
    assert not world.forward()


def test_what_a_backward_changes_itself_does_not_count() -> None:
    world = World()
    world.forward()
    world.in_flight.before_backward()
    world.accumulating, world.stamp = True, (0, 1)
    world.in_flight.after_backward()
    assert world.forward()
    world.stamp = (1, 1)  # changed between forward and backward
    world.in_flight.before_backward()
    world.stamp = (1, 2)
    world.in_flight.after_backward()
    assert not world.forward()


def test_without_gradients_an_accumulation_begins() -> None:
    world = World()
    world.forward()
    assert not world.forward()


def test_every_phase_and_every_failure_ends_what_an_earlier_one_kept() -> None:
    world = World()
    seen = [world.in_flight.generation]
    world.forward()
    seen.append(world.in_flight.generation)
    world.in_flight.begin_backward()
    world.in_flight.end_backward()
    seen.append(world.in_flight.generation)
    world.in_flight.begin_forward([])
    world.in_flight.failed(ValueError("of the model's own"))
    seen.append(world.in_flight.generation)
    assert seen == sorted({*seen})


def test_after_a_failure_nothing_is_there_and_a_phase_may_begin() -> None:
    world = World()
    world.forward()
    world.accumulating = True
    world.in_flight.begin_backward()
    world.in_flight.failed(ValueError("of the model's own"))
    assert not world.forward()


def test_phase_inside_another_one_is_refused() -> None:
    world = World()
    world.in_flight.begin_backward()
    with pytest.raises(FxzeroError, match="A forward of this model begins inside its own backward"):
        world.in_flight.begin_forward([])
