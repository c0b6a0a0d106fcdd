import logging
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn

import fxzero
from fxzero.graph.nodes import Role, info, is_random, role
from fxzero.graph.schedule_text import totals
from fxzero.graph.step import Phase, StepGraph
from fxzero.memory.activations import activation_buffers
from fxzero.memory.lifetimes import Kind
from fxzero.passes import RecomputeActivations, default_passes
from tests.helpers.pairs import assert_same, pair
from tests.helpers.toy_step import toy_step

BATCH, WIDTH = 4, 16
TENSOR_BYTES = BATCH * WIDTH * 4


class Layer(nn.Module):
    """Saves for backward: x, the mask of relu's input, the dropout noise, what the second matrix reads."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.dropout(nn.functional.gelu(self.up(x)), 0.5))


class Net(nn.Module):
    def __init__(self, num_layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(num_layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def planned(recompute: Any, model: nn.Module | None = None) -> StepGraph:
    with torch.device("meta"):
        model = model or Net()
    x = torch.zeros(BATCH, WIDTH, requires_grad=True)
    return fxzero.planner.plan(model, x, world_size=2, passes=default_passes(recompute=recompute)).step


def saved_tensors(step: StepGraph) -> int:
    nbytes = sum(buffer.nbytes for buffer in activation_buffers(step).values() if buffer.kind is Kind.SAVED)
    assert nbytes % TENSOR_BYTES == 0
    return nbytes // TENSOR_BYTES


def backward_ops(step: StepGraph) -> list[str]:
    return [
        str(n.target) for n, phase in step.phase_of().items() if phase is Phase.BACKWARD and role(n) is Role.COMPUTE
    ]


def test_full_saves_the_noise_and_what_one_block_hands_to_the_next() -> None:
    # None: gelu's input and output after dropout, the noise; and between layers x. The input of the step is the user's.
    assert saved_tensors(planned("none")) == 3 * 3 + 2
    full = planned("full")
    assert saved_tensors(full) == 3 + 2
    ops = backward_ops(full)
    assert ops.count("aten.gelu.default") == 3
    assert not any(is_random(n) for n, phase in full.phase_of().items() if phase is Phase.BACKWARD)


def test_recomputed_blocks_are_gathered_no_more_often() -> None:
    none, full = totals(planned("none")), totals(planned("full"))
    assert (full.num_all_gathers, full.gathered_bytes) == (none.num_all_gathers, none.gathered_bytes)
    with torch.device("meta"):
        model = Net()
    small = default_passes(recompute="full", bucket_bytes=1)
    step = fxzero.planner.plan(model, torch.zeros(BATCH, WIDTH), world_size=2, passes=small).step
    per_phase = [sum(role(node) is Role.ALL_GATHER for node in nodes) for _, nodes in step.phases()]
    assert per_phase[0] == 12
    assert per_phase[1] <= 12


@pytest.mark.parametrize(
    ("limit", "num_saved", "num_gelus", "num_products"),
    [(11, 11, 0, 0), (10, 10, 1, 0), (8, 8, 3, 0), (7, 7, 3, 1), (5, 5, 3, 3)],
)
def test_a_number_of_bytes_recomputes_cheap_operators_of_as_many_blocks_as_needed_then_whole_ones(
    limit: int, num_saved: int, num_gelus: int, num_products: int
) -> None:
    step = planned(limit * TENSOR_BYTES)
    assert saved_tensors(step) == num_saved
    ops = backward_ops(step)
    assert ops.count("aten.gelu.default") == num_gelus
    assert ops.count("aten.addmm.default") == num_products


def test_what_cannot_be_reached_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert saved_tensors(planned(0)) == 5
    assert_expected_inline(
        caplog.messages[0], """recompute=0 B: 1.2 KiB are saved for backward even with every block recomputed."""
    )


class WritesInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.register_buffer("count", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x) + self.count).square()
            self.count += 1
        return x


def test_what_is_read_from_a_buffer_that_changes_is_not_recomputed() -> None:
    torch.manual_seed(0)
    model = WritesInPlace()
    x = torch.randn(BATCH, WIDTH)
    gradients: list[list[Tensor]] = []
    for recompute in ("none", "full"):
        net = WritesInPlace()
        net.load_state_dict(model.state_dict())
        zero = fxzero.compile(net, passes=default_passes(recompute=recompute))
        for _ in range(2):
            zero(x).sum().backward()
        gradients.append([param.grad.clone() for param in zero.parameters()])
    assert all(map(torch.equal, *gradients))


def test_nothing_changes_without_backward_or_when_all_fits() -> None:
    for step, recompute in ((toy_step(backward=False), "full"), (toy_step(), "none"), (toy_step(), 10**9)):
        before = str(step.graph)
        RecomputeActivations(recompute)(step)
        assert str(step.graph) == before


def test_chain_of_matrices_is_recomputed_in_full() -> None:
    step = toy_step()
    RecomputeActivations("full")(step)
    read = {
        source for node, phase in step.phase_of().items() if phase is Phase.BACKWARD for source in node.all_input_nodes
    }
    names = {info(node).fqn for node in read if role(node) is Role.COMPUTE}
    assert names == {"layers.0", "layers.1", "layers.2"}


@pytest.mark.parametrize("recompute", ["all", -1, True, 1.5])
def test_other_values_are_refused(recompute: Any) -> None:
    with pytest.raises(ValueError, match='must be "none", "full" or a number of bytes'):
        RecomputeActivations(recompute)


class FrozenNorm(nn.Module):
    """Batch norm with frozen statistics, which hands empty tensors to its backward."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(self.linear(self.norm(x))).square().mean()


class OneStep(nn.Module):
    """A GRU over one step, whose gates are views of one operator's outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x[None])[0].sin().sum()


@pytest.mark.parametrize("recompute", ["full", 256])
@pytest.mark.parametrize("build", [FrozenNorm, OneStep])
def test_operators_of_several_outputs_are_kept_and_their_outputs_saved(build: Any, recompute: Any) -> None:
    torch.manual_seed(0)
    zero, plain = pair(build().eval(), recompute=recompute)
    x = torch.randn(BATCH, WIDTH)
    for module in (zero, plain):
        module(x).backward()
    assert_same(zero, plain)
