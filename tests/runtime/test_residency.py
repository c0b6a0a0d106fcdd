from __future__ import annotations

from fxzero.runtime.residency import Residency

A, B = ("a",), ("b",)


class World:
    """What a Residency looks at."""

    def __init__(self) -> None:
        self.accumulating, self.stamp = False, (0, 0)
        self.residency = Residency(lambda: self.accumulating, lambda: self.stamp)

    def forward(self) -> bool:
        """One forward that gathers what is not there; true if all was."""
        there = self.residency.has([A, B])
        self.residency.add([A, B])
        return there


def test_buckets_are_there_from_the_second_micro_step_on() -> None:
    world = World()
    assert not world.forward()
    world.accumulating = True  # after a backward
    assert world.forward()
    assert world.forward()
    assert not world.residency.has([("c",)])


def test_buckets_are_old_after_any_change() -> None:
    world = World()
    world.forward()
    world.accumulating = True
    assert world.forward()
    world.stamp = (1, 0)  # a parameter was changed in place
    assert not world.forward()
    assert world.forward()
    world.residency.expire()  # an optimizer stepped
    assert not world.forward()


def test_what_a_backward_changes_itself_does_not_count() -> None:
    world = World()
    world.forward()
    world.residency.look()
    world.accumulating, world.stamp = True, (0, 1)
    world.residency.end_backward()
    assert world.forward()
    world.stamp = (1, 1)  # changed between forward and backward
    world.residency.look()
    world.stamp = (1, 2)
    world.residency.end_backward()
    assert not world.forward()


def test_without_gradients_an_accumulation_begins() -> None:
    world = World()
    world.forward()
    assert not world.forward()
