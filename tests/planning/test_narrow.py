import torch
from torch import Tensor, nn

from fxzero.comm.gloo import GLOO
from fxzero.graph.devices import Devices
from fxzero.graph.nodes import Role
from fxzero.graph.recipe import Recipe
from fxzero.graph.sharding import Sharding
from fxzero.graph.verify import collectives
from fxzero.planning.narrow import narrow
from fxzero.planning.plan import Plan, make_plan
from tests.helpers.captured import trace


class Heads(nn.Module):
    """Two heads on a trunk, and an output of both."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = torch.tanh(self.trunk(x))
        a, b = self.a(hidden), self.b(hidden)
        return a, b, torch.cat([a, b], -1)


def plan() -> Plan:
    captured = trace(Heads(), torch.ones(2, 4), differentiated=(0, 1, 2))
    captured.step.sharding = Sharding.over(2)
    return make_plan(captured, Recipe(), GLOO, Devices.all(torch.device("cpu")))


def test_collectives_places_and_saved_values_stay() -> None:
    whole = plan()
    narrowed = narrow(whole, (0,))
    assert narrowed.captured.differentiated == (0,)
    assert list(narrowed.variants) == list(whole.variants)
    for variant, planned in narrowed.variants.items():
        before = whole.variants[variant]
        assert collectives(planned.step) == collectives(before.step)
        assert [node.name for node in planned.code.saved] == [node.name for node in before.code.saved]
        assert planned.arena.nbytes == before.arena.nbytes


def test_what_missing_gradients_reach_is_dropped() -> None:
    whole = plan()
    assert set(whole.step.grads) == {f"{layer}.{kind}" for layer in ("trunk", "a", "b") for kind in ("weight", "bias")}
    narrowed = narrow(whole, (0,)).step
    assert {fqn.split(".")[0] for fqn in narrowed.grads} == {"trunk", "a"}
    assert len(narrowed.nodes(Role.TANGENT)) == 1
    assert len(narrowed.nodes(Role.COMPUTE)) < len(whole.step.nodes(Role.COMPUTE))


def test_a_missing_gradient_is_zeros_where_it_meets_another() -> None:
    targets = [node.target for node in narrow(plan(), (0, 2)).step.graph.nodes]
    assert targets.count(torch.ops.aten.zeros.default) == 1
