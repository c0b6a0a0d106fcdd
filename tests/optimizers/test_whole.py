"""Who owns a parameter that is stepped whole, which optimizers may step so, and closures."""

import itertools

import pytest
import torch
from torch import nn

import fxzero
from fxzero.errors import OptimizerError
from fxzero.optimizers.classes import check_optimizer, steps_wholes
from fxzero.optimizers.whole.owners import choose_owners
from tests.distributed.whole_workers import Whitened
from tests.helpers.pairs import pair, points


def ranges(*numels: int) -> tuple[int, tuple[tuple[int, int], ...]]:
    """The size of a parameter of which each rank has some elements, and where they lie."""
    edges = [sum(numels[:rank]) for rank in range(len(numels) + 1)]
    return edges[-1], tuple(itertools.pairwise(edges))


@pytest.mark.parametrize(
    ("sizes", "owners"),
    [
        ([ranges(8, 0), ranges(6, 2), ranges(0, 8)], [0, 0, 1]),
        ([ranges(8, 0), ranges(2, 6), ranges(0, 8)], [0, 1, 1]),
        ([ranges(8, 0), ranges(4, 4)], [0, 1]),
        ([ranges(9, 0), ranges(3, 0), ranges(3, 0), ranges(3, 0)], [0, 1, 1, 1]),  # lying on one rank alone
        ([ranges(1, 1, 1), ranges(1, 1, 1)], [0, 1]),
        ([], []),
    ],
)
def test_owners_have_the_most_of_a_parameter_unless_they_would_have_too_much(sizes: list, owners: list) -> None:
    loads = [0] * (len(sizes[0][1]) if sizes else 1)
    assert choose_owners(sizes, loads) == owners
    assert sum(loads) == sum(numel for numel, _ in sizes)


def test_a_group_that_is_added_goes_to_whom_has_less() -> None:
    loads = [10, 0]
    assert choose_owners([ranges(4, 0)], loads) == [1]


def test_an_optimizer_that_looks_at_several_parameters_is_refused() -> None:
    params = [nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(2, 2))]
    check_optimizer(fxzero.whole_matrices(Whitened(params)), elementwise_optimizer=False)
    with pytest.raises(OptimizerError, match="Whitened cannot step whole parameters.*gives them other numbers"):
        check_optimizer(fxzero.whole_matrices(Whitened(params, over_all=True)), elementwise_optimizer=True)
    with pytest.raises(OptimizerError, match=r"fxzero.whole_matrices\(optimizer\)"):
        check_optimizer(Whitened(params), elementwise_optimizer=False)


def test_a_subclass_of_muon_steps_whole_parameters_and_is_tried() -> None:
    class Random(torch.optim.Muon):
        def step(self, closure: object = None) -> None:  # type: ignore[override]
            for param in self.param_groups[0]["params"]:
                if param.grad is not None:
                    param.data.add_(torch.randn(param.shape))

    optimizer = Random([nn.Parameter(torch.ones(3, 2))])
    assert steps_wholes(optimizer)
    with pytest.raises(OptimizerError, match="Random cannot step whole parameters"):
        check_optimizer(optimizer, elementwise_optimizer=True)


def test_a_closure_is_called_once() -> None:
    class Twice(torch.optim.Muon):
        def step(self, closure=None):
            if closure:
                closure()
            return super().step(closure)

    zero, _ = pair()
    optimizer = Twice([zero.body.weight])

    def closure() -> float:
        zero(points()).loss.backward()
        return 1.0

    with pytest.raises(OptimizerError, match="calls its closure more than once"):
        optimizer.step(closure)
    zero.zero_grad()
    zero(points()).loss.backward()  # after an error inside of a step the parameters are shards again
    assert zero.body.weight.shape[1] == 1
