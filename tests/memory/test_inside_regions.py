import torch
from torch import Tensor, fx, nn

from fxzero.graph.fusion.operators import REDUCTIONS
from fxzero.graph.regions import Region, is_region, region_of
from fxzero.memory.activations import activation_buffers
from fxzero.memory.inside_regions import inside_bytes
from fxzero.memory.lifetimes import Kind
from fxzero.passes import default_passes
from fxzero.planner import plan

aten = torch.ops.aten
ROWS, COLUMNS = 6, 4


def softmax(dtype: torch.dtype = torch.float32, placed: tuple[int, ...] = ()) -> Region:
    """The softmax of rows, and their largest values."""
    body = fx.Graph()
    x = torch.randn(ROWS, COLUMNS, dtype=dtype)

    def node(made: fx.Node, value: Tensor) -> fx.Node:
        made.meta["val"] = value
        return made

    given = node(body.placeholder("x"), x)
    top = node(body.call_function(aten.amax.default, (given, [1], True)), x.amax(1, True))
    less = node(body.call_function(aten.sub.Tensor, (given, top)), x - x.amax(1, True))
    exp = node(body.call_function(aten.exp.default, (less,)), x)
    total = node(body.call_function(aten.sum.dim_IntList, (exp, [1], True)), x.sum(1, True))
    result = node(body.call_function(aten.div.Tensor, (exp, total)), x)
    body.output((result, top))
    return Region.of(body, 5, placed)


def test_a_region_allocates_the_statistics_that_it_does_not_return() -> None:
    assert inside_bytes(softmax()) == ROWS * 4
    assert inside_bytes(softmax(torch.bfloat16)) == ROWS * 4
    assert inside_bytes(softmax(placed=(1,))) == 2 * ROWS * 4  # written to its place from there


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x * 2)).square().mean()


def test_it_is_in_the_memory_of_the_plan_while_the_region_runs() -> None:
    step = plan(Norm(), torch.randn(8, 16), world_size=1, passes=default_passes(compute="fused")).step
    buffers, at = activation_buffers(step), step.positions()
    calls = [node for node in step.graph.nodes if is_region(node)]
    inside = {call: inside_bytes(region_of(call)) for call in calls}
    assert any(inside.values())
    for call, nbytes in inside.items():
        if nbytes:
            buffer = buffers[call]
            assert (buffer.kind, buffer.nbytes, buffer.start, buffer.end) == (
                Kind.TEMPORARY,
                nbytes,
                at[call],
                at[call],
            )
        has_sums = any(node.target in REDUCTIONS for node in region_of(call).body.nodes)
        assert has_sums or call not in buffers
