"""When two values are the same, and what is said of those that are not."""

from typing import Any

import pytest
import torch

from fxzero.planning.compare_results import difference, differences, largest_magnitude, nan_throughout

NAN, INF = float("nan"), float("inf")
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", [*FLOATS, torch.complex64])
def test_floats_are_compared_by_their_bits_and_nan_equals_any_nan(dtype: torch.dtype) -> None:
    before = torch.tensor([0.0, NAN, 1.0]).to(dtype)
    assert difference(before, before.clone()) is None
    assert difference(before, torch.tensor([0.0, -NAN, 1.0]).to(dtype)) is None
    assert difference(before, torch.tensor([-0.0, NAN, 1.0]).to(dtype)) is not None
    assert difference(before, torch.tensor([0.0, 1.0, 1.0]).to(dtype)) is not None


def test_nan_of_any_payload_equals_nan() -> None:
    one, other = (torch.tensor([bits], dtype=torch.int32).view(torch.float32) for bits in (0x7FC00000, 0x7F800001))
    assert difference(one, other) is None
    assert difference(one, torch.tensor([INF])) is not None


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [
        (torch.zeros(2, 3), torch.ones(2, 3), "differs in 6 of 6 elements; the first at [0, 0] was 0.0 and is 1.0"),
        (torch.tensor(2), torch.tensor(3), "differs in 1 of 1 elements; the first was 2 and is 3"),
        (
            torch.tensor([True]),
            ~torch.tensor([True]),
            "differs in 1 of 1 elements; the first at [0] was True and is False",
        ),
        (torch.zeros(2), torch.zeros(1, 2), "was float32 [2] and is float32 [1, 2]"),
        (torch.zeros(2), torch.zeros(2).half(), "was float32 [2] and is float16 [2]"),
        (torch.zeros(2), None, "was float32 [2] and is None"),
        (1, 1.0, "was 1 and is 1.0"),
        (1, 1, None),
        (None, None, None),
        (torch.zeros(3, 2).t(), torch.zeros(2, 3), None),
    ],
)
def test_difference_is_said_in_words(before: Any, after: Any, text: str | None) -> None:
    assert difference(before, after) == text


def test_tolerance_is_relative_to_the_largest_of_a_kind() -> None:
    before = {
        "gradient of": {"w": torch.tensor([100.0, INF]), "b": torch.tensor([1.0])},
        "output": {"0": torch.ones(1)},
    }
    after = {"gradient of": {"w": torch.tensor([101.0, INF]), "b": torch.tensor([0.5])}, "output": {"0": torch.ones(1)}}
    assert list(differences(before, after, 0.01)) == []
    assert [name for name, _ in differences(before, after, 0.001)] == ["gradient of w", "gradient of b"]
    assert [name for name, _ in differences(before, after)] == ["gradient of w", "gradient of b"]
    assert largest_magnitude(before["gradient of"].values()) == 100.0


@pytest.mark.parametrize(("before", "after"), [([NAN], [1.0]), ([1.0], [NAN]), ([INF], [-INF]), ([INF], [1.0])])
def test_nan_and_infinity_are_within_no_tolerance(before: list[float], after: list[float]) -> None:
    assert difference(torch.tensor(before), torch.tensor(after), 1e9) is not None
    assert difference(torch.tensor(before), torch.tensor(before), 1e9) is None


def test_integers_are_not_compared_within_a_tolerance() -> None:
    assert difference(torch.tensor([1]), torch.tensor([2]), 0.1) is None


def test_value_that_is_missing_is_a_difference() -> None:
    results = {"gradient of": {"w": torch.zeros(2)}}
    assert list(differences(results, {"gradient of": {}})) == [("gradient of w", "was float32 [2] and is None")]
    assert list(differences({"gradient of": {}}, results)) == [("gradient of w", "was None and is float32 [2]")]


def test_values_of_nan_alone_are_found() -> None:
    nothing = {"x": torch.empty(0), "y": torch.tensor([NAN, 1.0]), "z": None, "i": torch.zeros(2).long()}
    assert list(nan_throughout({"output": nothing, "gradient of": {"w": torch.full((2,), NAN)}})) == ["gradient of w"]
