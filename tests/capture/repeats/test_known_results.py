"""Results of a rehearsal that are made again are what fake operators give; all that a key leaves out is run."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fxzero import torch_internals
from fxzero.capture.repeats.arguments import Arguments
from fxzero.capture.repeats.known_results import KnownResults

aten = torch.ops.aten


class Runs:
    """Counts the operators that are run."""

    def __init__(self) -> None:
        self.num = 0

    def __call__(self, op: Any, args: Any, kwargs: Any) -> Any:
        self.num += 1
        return op(*args, **kwargs)


def _run(call: Callable[[Callable[..., Any], Tensor], Any]) -> tuple[int, list[Any], list[Tensor]]:
    """The number of operators that ran in two equal calls, and the results and the arguments of these."""
    mode, runs = torch_internals.fake_tensor_mode(), Runs()
    known = KnownResults(mode)
    with mode:
        given = [torch.empty(4, 6) for _ in range(2)]
        results = [
            call(lambda op, *args, **kwargs: known.run(op, Arguments(args, kwargs), runs), each) for each in given
        ]
    return runs.num, results, given


def _attention(run: Callable[..., Any], x: Tensor, dropout: float) -> Any:
    heads = x[None, None]
    return run(aten._scaled_dot_product_flash_attention_for_cpu.default, heads, heads, heads, dropout)


@pytest.mark.parametrize(
    "call",
    [
        lambda run, x: run(aten.mm.default, x, torch.empty(6, 3)),
        lambda run, x: run(aten.add.Tensor, run(aten.t.default, x), 1.5),
        lambda run, x: run(aten.view.default, run(aten.slice.Tensor, x, 0, 1, 3), [-1]),
        lambda run, x: run(aten.native_layer_norm.default, x, [6], None, None, 1e-5),
        lambda run, x: run(aten._to_copy.default, run(aten.expand.default, x, [2, 4, 6]), dtype=torch.bfloat16),
        lambda run, x: run(aten.cat.default, [x, x], 1),
        lambda run, x: run(aten.cat.default, [torch.tensor([]), x], 1),
        lambda run, x: _attention(run, x, dropout=0.0),
    ],
)
def test_second_call_is_not_run_and_gives_the_same(call: Callable[..., Any]) -> None:
    asked = list[Any]()

    def noted(run: Callable[..., Any], x: Tensor) -> Any:
        def run_noted(*args: Any, **kwargs: Any) -> Any:
            asked.append(args[0])
            return run(*args, **kwargs)

        return call(run_noted, x)

    num, (first, second), _ = _run(noted)
    assert 2 * num == len(asked)
    for a, b in zip(*([each] if isinstance(each, Tensor) else each for each in (first, second)), strict=True):
        assert torch_internals.fake_geometry(a) == torch_internals.fake_geometry(b)
        assert not torch_internals.same_storage(a, b)


@pytest.mark.parametrize(
    "call",
    [
        lambda run, x: run(aten.slice.Tensor, x, 1, 2, 5),
        lambda run, x: run(aten.detach.default, x),
        lambda run, x: run(aten._unsafe_view.default, x, [24]),
    ],
)
def test_view_that_is_made_again_shares_the_memory_of_its_own_argument(call: Callable[..., Any]) -> None:
    num, views, given = _run(call)
    assert num == 1
    assert [torch_internals.same_storage(a, b) for a, b in zip(views, given, strict=True)] == [True, True]
    assert torch_internals.fake_geometry(views[0]) == torch_internals.fake_geometry(views[1])


@pytest.mark.parametrize(
    "call",
    [
        lambda run, x: run(aten.add_.Tensor, x, 1),
        lambda run, x: run(aten.bernoulli.p, x, 0.5),
        lambda run, x: _attention(run, x, dropout=0.5),
        lambda run, x: run(aten.lift_fresh.default, x),
        lambda run, x: run(aten.split.Tensor, x, 2),
        lambda run, x: run(aten.add.Tensor, torch.tensor(1.0), torch.tensor(2.0)),
        lambda run, x: run(aten.lift_fresh_copy.default, x),
    ],
)
def test_operator_that_is_in_no_key_is_run_each_time(call: Callable[..., Any]) -> None:
    assert _run(call)[0] == 2


def test_other_geometry_number_or_default_dtype_is_another_key() -> None:
    mode, runs = torch_internals.fake_tensor_mode(), Runs()
    known = KnownResults(mode)
    with mode:
        x, ints = torch.empty(4, 4), torch.empty(4, 4, dtype=torch.int64)
        for args in ((ints, 1), (ints, True), (ints, 1.0), (x, 1), (x.t(), 1), (x[:, :2], 1)):
            result = known.run(aten.mul.Tensor, Arguments(args, {}), runs)
            assert torch_internals.fake_geometry(result) == torch_internals.fake_geometry(args[0] * args[1])
        torch.set_default_dtype(torch.float64)
        try:
            assert known.run(aten.mul.Tensor, Arguments((ints, 1.0), {}), runs).dtype is torch.float64
        finally:
            torch.set_default_dtype(torch.float32)
    assert runs.num == 7
