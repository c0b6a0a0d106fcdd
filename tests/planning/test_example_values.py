"""What a check feeds: real values where they are, else made up ones that keep activations finite."""

import torch
from torch import Tensor, nn

import fxzero
from fxzero.graph.nodes import Role, info, role
from fxzero.planning.example_values import example_values
from fxzero.testing import engine_of, run_ranks
from tests.helpers.captured import trace
from tests.helpers.pairs import Net, points


class Masked(nn.Module):
    """A linear layer, a mask and indices; a variance among the buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(100, 4)
        self.register_buffer("variance", torch.ones(4))

    def forward(self, x: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
        """Returns a scalar."""
        hidden = (self.linear(x) / self.variance.sqrt())[rows]  # type: ignore[operator]
        return hidden.masked_fill(~mask, -1e9).softmax(-1).square().sum()


def values_of(model: nn.Module, *args: Tensor) -> dict[tuple[Role, str], Tensor]:
    step = trace(model, *args).step
    values = example_values(step, model, args)
    return {(role(node), info(node).fqn): values[node.name] for node in step.graph.find_nodes(op="placeholder")}


def test_values_that_are_there_are_fed() -> None:
    model, x = Net(), points()
    values = values_of(model, x)
    assert values[Role.INPUT, "args[0]"] is x
    assert all(torch.equal(values[Role.PARAM, fqn], param) for fqn, param in model.named_parameters())
    assert all(torch.equal(values[Role.BUFFER, fqn], buffer) for fqn, buffer in model.named_buffers())


def test_values_that_are_not_there_are_made_up_and_the_same_in_every_run() -> None:
    with torch.device("meta"):
        model = Masked()
        args = torch.empty(3, 100).t().contiguous().t(), torch.empty(3, 4, dtype=torch.bool), torch.empty(3).long()
    before = torch.get_rng_state()
    values, again = values_of(model, *args), values_of(model, *args)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, again[key]) for key, value in values.items())
    assert all(value.device.type == "cpu" for value in values.values())
    assert values[Role.INPUT, "args[0]"].stride() == (1, 3)
    assert values[Role.INPUT, "args[1]"].tolist() == [[True, False] * 2] * 3
    assert values[Role.INPUT, "args[2]"].tolist() == [0, 0, 0]
    assert 0.3 < values[Role.PARAM, "linear.weight"].square().sum(1).mean().sqrt() < 3
    assert values[Role.BUFFER, "variance"].min() >= 0.5


def values_on_a_rank(rank: int, world_size: int) -> list[bool]:
    """Worker: for each parameter, whether the check would be fed its real values."""
    torch.manual_seed(0)
    model = Net()
    full = {fqn: param.detach().clone() for fqn, param in model.named_parameters()}
    zero = fxzero.compile(model, example=points())
    values = example_values(engine_of(zero).last.step, model, [points()])
    params = engine_of(zero).last.step.param_nodes()
    assert all(values[node.name].shape == full[fqn].shape for fqn, node in params.items())
    whole = [param.numel() == full[fqn].numel() for fqn, param in model.named_parameters()]
    real = [torch.equal(values[params[fqn].name], value) for fqn, value in full.items()]
    assert [is_real for is_real, is_whole in zip(real, whole, strict=True) if is_whole] == [True] * sum(whole)
    return real


def test_shards_are_fed_where_a_rank_holds_the_whole_parameter() -> None:
    assert run_ranks(1, values_on_a_rank) == [[True] * 8]
    first, second = run_ranks(2, values_on_a_rank)
    assert [one and other for one, other in zip(first, second, strict=True)] == [False] * 8
