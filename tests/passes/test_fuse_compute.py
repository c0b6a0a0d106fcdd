from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxzero
from fxzero import torch_internals
from fxzero.errors import PassOrderError, RegionInputError
from fxzero.graph.fusion.gaps import is_transparent
from fxzero.graph.nodes import Role, is_random
from fxzero.graph.regions import region_inputs
from fxzero.graph.schedule_text import format_schedule
from fxzero.graph.step import StepGraph
from fxzero.graph.verify import verify_graph
from fxzero.memory.activations import activation_buffers
from fxzero.memory.lifetimes import Kind
from fxzero.passes import FuseCompute, default_passes
from tests.helpers.regions import calls_of_regions, regions, uncompiled
from tests.helpers.toy_step import toy_step

BATCH, WIDTH = 8, 16


class Layer(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        return x + F.dropout(self.down(F.gelu(self.up(self.norm(x)))), self.dropout)


class Net(nn.Module):
    def __init__(self, num_layers: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(dropout) for _ in range(num_layers))
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(x), labels)


class Image(nn.Module):
    """Batch norm, whose buffers forward writes, group norm, a mask made of nothing, a checkpoint, a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.group = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4)
        self.body = nn.Linear(4, 4)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        h = self.group(F.relu(self.norm(self.conv(x)))).mean((2, 3))
        h = h + torch.ones_like(h).tril() * checkpoint(lambda h: F.silu(self.body(h)), h, use_reentrant=False)
        first, second = (h * 2).split(2, dim=1)
        return F.cross_entropy(torch.cat([second.exp(), first], 1) @ self.body.weight, labels)


def batch(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(*shape), torch.arange(shape[0]) % 4


def planned(model: nn.Module, example: Any, compute: str = "fused", **options: Any) -> StepGraph:
    return fxzero.planner.plan(model, example, world_size=2, passes=default_passes(compute=compute, **options)).step


def products(step: StepGraph) -> list[str]:
    """Matrix products and draws, in order."""
    names = (str(node.target) for node in step.nodes(Role.COMPUTE))
    return [name for name in names if any(part in name for part in ("mm", "bernoulli"))]


def saved_bytes(step: StepGraph) -> int:
    return sum(buffer.nbytes for buffer in activation_buffers(step).values() if buffer.kind is Kind.SAVED)


def test_schedule_has_a_line_for_each_region() -> None:
    with torch.device("meta"):
        step = planned(Net(1), batch(BATCH, WIDTH))
    assert_expected_inline(
        format_schedule(step),
        """\
world_size=2  2 all_gathers, 4 KiB received  1 reduce_scatter, 2 KiB sent  gathered peak 4 KiB
all_gather      layers.0.norm.weight +7      4 KiB
wait            layers.0.norm.weight +7
compute         layers.0 fused               7 ops
compute         (model) fused                4 ops
compute         layers.0                     2 ops
compute         layers.0 fused               5 ops
compute         layers.0                     3 ops
compute         head                         2 ops
release         layers.0.norm.weight +7
compute         (model) fused               11 ops
--- end of forward ---
all_gather      layers.0.norm.weight +7      4 KiB
compute         (model) fused               12 ops
wait            layers.0.norm.weight +7
compute         head                         1 op
compute         layers.0                     1 op
compute         head                         2 ops
compute         layers.0                     1 op
compute         layers.0 fused              12 ops
compute         layers.0                     3 ops
release         layers.0.norm.weight +7
compute         layers.0 fused               5 ops
compute         layers.0                     2 ops
compute         head                         1 op
reduce_scatter  layers.0.norm.weight +7      4 KiB
wait_reduce     layers.0.norm.weight +7""",
    )


def test_layers_share_regions() -> None:
    with torch.device("meta"):
        two, four = (regions(planned(Net(layers), batch(BATCH, WIDTH))) for layers in (2, 4))
    assert {region.key for region in two} >= {region.key for region in four}
    assert len(four) > len(two)


def test_draws_and_products_keep_their_order_and_less_is_saved() -> None:
    model, example = Net(2, dropout=0.5), batch(BATCH, WIDTH)
    eager, fused = planned(model, example, "eager"), planned(model, example)
    assert products(fused) == products(eager)
    assert any(is_random(node) for node in fused.nodes(Role.COMPUTE))
    assert saved_bytes(fused) < 0.9 * saved_bytes(eager)
    assert saved_bytes(planned(model, example, recompute="full")) < 0.6 * saved_bytes(fused)


@pytest.mark.parametrize("model, example", [(Net(2, 0.5), batch(BATCH, WIDTH)), (Image(), batch(4, 3, 8, 8))])
def test_numbers_stay_within_the_tolerance(model: nn.Module, example: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXZERO_CHECK", "1")  # runs the graph after each pass
    with uncompiled():
        for recompute in ("none", "full"):
            step = planned(model, example, recompute=recompute)
    in_regions = {str(node.target) for region in regions(step) for node in region.body.nodes}
    assert not any("mm" in name or "convolution" in name or "copy_" in name for name in in_regions)
    outside = [node for node in step.nodes(Role.COMPUTE) if not is_transparent(node)]
    assert not any("softmax" in str(node.target) or "norm" in str(node.target) for node in outside)


def operators(step: StepGraph) -> set[str]:
    """The names of operators in regions."""
    nodes = (node for region in regions(step) for node in region.body.nodes if node.op == "call_function")
    return {str(node.target).split(".")[1] for node in nodes}


class Gated(nn.Module):
    """Norms of a model's own, a gate, and half precision inside."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))
        self.gate, self.up, self.down = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        n = self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
        h = x + self.down(F.silu(self.gate(n)) * self.up(n))
        half = (h.bfloat16() * 3 + h.bfloat16()).float()
        return (torch.cat([h, -half], -1) * 0.5).square().sum()


@pytest.mark.parametrize(
    "model, example",
    [(Net(2, 0.5), batch(BATCH, WIDTH)), (Image(), batch(4, 3, 8, 8)), (Gated(), torch.randn(BATCH, WIDTH))],
)
def test_exact_regions_hold_what_has_one_right_result(
    model: nn.Module, example: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FXZERO_CHECK", "1")  # bit for bit
    with uncompiled():
        step = planned(model, example, "exact")
    assert FuseCompute(exact=True).tolerance == 0.0
    assert all(region.exact for region in regions(step)) and len(regions(step)) >= 2
    assert operators(step) <= {
        *("add", "sub", "rsub", "mul", "div", "rsqrt", "pow", "neg", "ne", "gt", "le", "eq", "where", "cat", "clone"),
        *(
            "_to_copy",
            "slice_backward",
            "threshold_backward",
            "relu",
            "tril",
            "view",
            "expand",
            "slice",
            "t",
            "permute",
        ),
        *("unsqueeze", "transpose", "select", "_unsafe_view", "squeeze", "full", "ones", "alias", "detach", "split"),
    }


def test_exact_compute_saves_less() -> None:
    eager, exact = (planned(Gated(), torch.randn(BATCH, WIDTH), compute) for compute in ("eager", "exact"))
    assert saved_bytes(exact) < 0.75 * saved_bytes(eager)
    silus = [node for node in exact.nodes(Role.COMPUTE) if node.target is torch.ops.aten.silu.default]
    assert len(silus) == 2  # again in backward, by itself


def test_exact_regions_round_half_precision_where_eager_does() -> None:
    step = planned(Gated(), torch.randn(BATCH, WIDTH), "exact")
    for region in regions(step):
        halves = {node for node in region.body.nodes if node.meta.get("val") is not None and is_half(node)}
        made = {node for node in halves if node.op == "call_function"}
        assert not any(made.intersection(node.all_input_nodes) for node in region.body.nodes if node.op != "output")


def is_half(node: Any) -> bool:
    return node.meta["val"].dtype is torch.bfloat16


def test_forward_alone_is_fused_too() -> None:
    with torch.no_grad():
        step = planned(Net(1), batch(BATCH, WIDTH))
    assert len(regions(step)) >= 2 and not step.has_backward


def test_products_alone_stay_as_they_are() -> None:
    step, fused = toy_step(), toy_step()
    FuseCompute()(fused)
    assert not regions(fused)
    assert products(fused) == products(step)


@pytest.mark.parametrize("shape", [(6, 5), (5,), (2, 5, 3, 3)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_gradients_of_log_probabilities_are_no_scatter(shape: tuple[int, ...], reduction: str, weighted: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, requires_grad=True)
    labels = torch.randint(0, 5, (*shape[:1], *shape[2:]) if len(shape) > 1 else ())
    if labels.dim():
        labels.flatten()[1] = -100
    weight = torch.rand(5) if weighted else None
    expected = F.nll_loss(x, labels, weight, reduction=reduction).sum()
    (gradient,) = torch.autograd.grad(expected, x)

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            return F.nll_loss(x * self.scale, labels, weight, reduction=reduction).sum()

    zero = fxzero.compile(Loss(), compute="fused")
    with uncompiled():
        zero(x, labels).backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, gradient)
    names = {str(node.target) for region in regions(zero.schedule.step) for node in region.body.nodes}
    assert not any("scatter" in name for name in names) and len(names) > 3


def test_one_tensor_given_twice_is_no_example_for_two_tensors() -> None:
    x, y = torch.randn(3), torch.randn(3)
    parts = torch_internals.decomposed(torch.ops.aten.mse_loss.default, (x, x), {})
    assert parts is not None
    torch.testing.assert_close(parts(x, y)[0], F.mse_loss(x, y))


class Lossy(Net):
    """Differences of nearly equal numbers, and integers of quotients."""

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        small = x * 1e-6
        return (torch.expm1(small * 0.5) / small + (x + 1) // 0.1 + (x + 1) % 0.1).sum() + super().forward(x, labels)


def test_what_loses_digits_in_a_region_runs_by_itself() -> None:
    with torch.device("meta"):
        step = planned(Lossy(1), batch(BATCH, WIDTH))
    in_regions = {str(node.target) for region in regions(step) for node in region.body.nodes}
    alone = {str(node.target) for node in step.nodes(Role.COMPUTE)}
    for name in ("expm1", "floor", "remainder"):
        assert any(name in each for each in alone) and not any(name in each for each in in_regions), name


class Twins(nn.Module):
    """Returns equal values twice, and computes them once more for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.inner(x)
        return (h * 2).exp(), (h * 2).exp(), (h * 2).exp().sum()


def test_equal_outputs_stay_two_tensors() -> None:
    outputs = planned(Twins(), batch(BATCH, WIDTH)[:1]).model_outputs
    assert len(set(outputs)) == 3


def test_refused_behind_gathers() -> None:
    step = toy_step()
    for each in default_passes():
        each(step)
    with pytest.raises(PassOrderError, match="before InsertAllGathers"):
        FuseCompute()(step)


def test_an_input_of_another_geometry_is_refused() -> None:
    step = planned(Net(1), batch(BATCH, WIDTH))
    call = calls_of_regions(step)[0]
    source = region_inputs(call)[0]
    source.meta["val"] = torch.empty(3, 3, device="meta")
    with pytest.raises(RegionInputError, match=r"reads .* which is float32 \[3, 3\]"):
        verify_graph(step)
