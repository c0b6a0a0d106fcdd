"""Integers that depend on a length: the polynomial of degree two that has given values at three lengths, exactly."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

Values = tuple[int, int, int]
"""What an integer is at each of three lengths."""


class Number(int):
    """Stands in a graph for an integer that depends on the length; its own value is the one at the last length."""

    index: int
    """Place among the polynomials of the family."""

    def __new__(cls, value: int, index: int) -> "Number":
        made = super().__new__(cls, value)
        made.index = index
        return made

    @property
    def name(self) -> str:
        """The name that stands for it in generated code."""
        return f"of_length_{self.index}"


@dataclass(frozen=True)
class Polynomial:
    """The polynomial of degree two or less through three points."""

    coefficients: tuple[Fraction, Fraction, Fraction]

    @classmethod
    def through(cls, lengths: Values, values: Values) -> "Polynomial":
        """The polynomial that has these values at these lengths, by divided differences."""
        (a, b, c), (u, v, w) = lengths, values
        first, second = Fraction(v - u, b - a), Fraction(w - v, c - b)
        square = (second - first) / (c - a)
        slope = first - square * (a + b)
        return cls((u - slope * a - square * a * a, slope, square))

    @property
    def is_linear(self) -> bool:
        """True if the three points lie on one line."""
        return self.coefficients[2] == 0

    def at(self, length: int) -> int | None:
        """The value at a length; None if it is no integer."""
        constant, slope, square = self.coefficients
        value = constant + slope * length + square * length * length
        return int(value) if value.denominator == 1 else None


class Polynomials:
    """All polynomials of a family."""

    def __init__(self, lengths: Values) -> None:
        self.lengths = lengths
        self._indices: dict[Values, int] = {}
        self.all: list[Polynomial] = []

    def number(self, values: Values) -> int:
        """An integer by its values at the three lengths: a plain one if they are equal, else a Number."""
        if values[0] == values[1] == values[2]:
            return values[0]
        index = self._indices.setdefault(values, len(self.all))
        if index == len(self.all):
            self.all.append(Polynomial.through(self.lengths, values))
        return Number(values[2], index)

    def numbers(self, rows: Sequence[Sequence[int]]) -> list[int]:
        """The integers of three records or graphs, one after another."""
        first, second, third = rows
        return [self.number(values) for values in zip(first, second, third, strict=True)]

    def at(self, length: int) -> list[int] | None:
        """The value of each polynomial at a length; None if one is no integer."""
        values = [each.at(length) for each in self.all]
        found = [value for value in values if value is not None]
        return found if len(found) == len(values) else None


def value_of(number: int, values: Sequence[int]) -> int:
    """An integer at some length.

    Args:
        values: of each polynomial at that length.
    """
    return values[number.index] if type(number) is Number else number


def names_of_numbers(values: Sequence[int]) -> dict[str, int]:
    """Maps the names of Numbers in generated code to their values."""
    return {Number(0, index).name: value for index, value in enumerate(values)}
