from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from fxzero.graph.regions import Region
from fxzero.planning import compile_regions
from fxzero.planning.probe_regions import differs

aten = torch.ops.aten


def region(x: Tensor, y: Tensor, placed: tuple[int, ...] = ()) -> Region:
    """x - y, and its product with x."""
    body = fx.Graph()
    nodes = [body.placeholder("x"), body.placeholder("y")]
    difference = body.call_function(aten.sub.Tensor, (nodes[0], nodes[1]))
    product = body.call_function(aten.mul.Tensor, (difference, nodes[0]))
    values = [x, y, x - y, (x - y) * x]
    for node, value in zip((*nodes, difference, product), values, strict=True):
        node.meta["val"] = value
    body.output((difference, product))
    return Region.of(body, 2, placed, exact=True)


def code(compute: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Callable[[list[Any]], Sequence[Tensor]]:
    return lambda inputs: compute(inputs[0], inputs[1])


EXAMPLES = {
    "small": (torch.empty(3, 5), torch.empty(5)),
    "large": (torch.empty(70, 1000), torch.empty(70, 1000)),
    "strided": (torch.empty(6, 4).t(), torch.empty(4, 1).expand(4, 6)),
    "half": (torch.empty(9, dtype=torch.bfloat16), torch.empty(9, dtype=torch.bfloat16)),
    "integers": (torch.empty(9, dtype=torch.int64), torch.empty(9, dtype=torch.int32)),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_operators_do_not_differ_from_themselves(name: str) -> None:
    assert differs(region(*EXAMPLES[name]), code(lambda x, y: (x - y, (x - y) * x))) is None


DIFFERENT: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "a product and a difference round once": lambda x, y: (
        x - y,
        torch.addcmul(-(x.double() * y.double()), x.double(), x.double()).float(),
    ),
    "other sign of zero": lambda x, y: (-(y - x), -(y - x) * x),
    "denormal numbers are zeros": lambda x, y: (
        torch.where((x - y).abs() < torch.finfo(torch.float32).smallest_normal, 0, x - y),
        (x - y) * x,
    ),
    "the last element alone": lambda x, y: (
        torch.cat([(x - y).flatten()[:-1], (x - y).flatten()[-1:].nextafter(x.new_tensor(0.0))]).view(x.shape),
        (x - y) * x,
    ),
    "infinity is the largest number": lambda x, y: ((x - y).clamp(max=torch.finfo(torch.float32).max), (x - y) * x),
    "other strides": lambda x, y: ((x - y).t().contiguous().t(), (x - y) * x),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_a_difference_of_a_bit_is_found(what: str) -> None:
    how = differs(region(*EXAMPLES["large"]), code(DIFFERENT[what]))
    assert how is not None and "elements, on" in how


def test_a_result_that_is_written_elsewhere_is_compared_in_its_place() -> None:
    made = region(*EXAMPLES["small"], placed=(1,))

    def writes(inputs: list[Any]) -> list[Tensor]:
        x, y, place = inputs
        place.copy_((x - y) * x)
        return [x - y]

    def writes_nothing(inputs: list[Any]) -> list[Tensor]:
        return [inputs[0] - inputs[1]]

    assert differs(made, writes) is None
    how = differs(made, writes_nothing)
    assert how is not None and how.startswith("result 1 differs in ")


def test_random_numbers_of_torch_stay_as_they_are() -> None:
    before = torch.get_rng_state()
    differs(region(*EXAMPLES["small"]), code(lambda x, y: (x - y, (x - y) * x)))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_region_that_differs_runs_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = code(lambda x, y: (x - y, (x - y) * x * 1.0000001))
    monkeypatch.setattr(compile_regions.torch_internals, "compile_graph", lambda *_: wrong)
    monkeypatch.setattr(compile_regions, "_compiled", {})
    exact = region(*EXAMPLES["small"])
    assert compile_regions.compiled(exact) is exact
    within_rounding = Region.of(exact.body, 2)
    assert compile_regions.compiled(within_rounding) is wrong
