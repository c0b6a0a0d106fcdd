import logging
from unittest.mock import patch

import pytest
import torch
from torch import fx

from fxzero import torch_internals
from fxzero.graph.regions import Region
from fxzero.planning import compile_regions
from tests.helpers.regions import uncompiled

aten = torch.ops.aten


def region(rows: int = 6) -> Region:
    """Two results of three operators, one with strides of its own."""
    body = fx.Graph()
    x, y = torch.randn(rows, 4, device="meta"), torch.randn(4, device="meta")
    nodes = [body.placeholder(name) for name in ("x", "y")]
    nodes[0].meta["val"], nodes[1].meta["val"] = x, y

    def compute(target: object, *args: object) -> fx.Node:
        node = body.call_function(target, args)  # pyright: ignore
        node.meta["val"] = target(*[arg.meta["val"] if isinstance(arg, fx.Node) else arg for arg in args])  # pyright: ignore
        return node

    added = compute(aten.add.Tensor, nodes[0], nodes[1])
    turned = compute(aten.transpose.int, added, 0, 1)
    body.output((compute(aten.exp.default, turned), compute(aten.sum.dim_IntList, added, [1])))
    return Region.of(body, 3)


def test_keys_follow_from_operators_and_geometry() -> None:
    assert region().key == region().key
    assert region().key != region(7).key
    assert region().read_by == (frozenset({0, 1}), frozenset({0, 1}))


def test_compiled_once_and_equal_to_the_operators(caplog: pytest.LogCaptureFixture) -> None:
    example = region()
    real = Region(_on_cpu(example.body), example.num_ops, "test")
    x, y = torch.randn(6, 4), torch.randn(4)
    with patch.dict(compile_regions._compiled, clear=True):
        run = compile_regions.compiled(real)
        assert compile_regions.compiled(real) is run and run is not real
    expected, found = real([x, y]), run([x, y])
    for before, after in zip(expected, found, strict=True):
        torch.testing.assert_close(after, before)
        assert after.stride() == before.stride()
    with pytest.raises(AssertionError, match="expected size 3==6"):
        run([torch.randn(3, 4), y])


def test_what_cannot_be_compiled_runs_one_by_one(caplog: pytest.LogCaptureFixture) -> None:
    example = region()

    def fails(*_: object) -> None:
        raise NotImplementedError("no such operator")

    with (
        patch.object(torch_internals, "compile_graph", fails),
        patch.dict(compile_regions._compiled, clear=True),
        caplog.at_level(logging.DEBUG),
    ):
        assert compile_regions.compiled(example) is example
    assert "a region of 3 operators runs one by one: no such operator" in caplog.text
    with uncompiled():
        assert compile_regions.compiled(example) is example


def _on_cpu(body: fx.Graph) -> fx.Graph:
    for node in body.nodes:
        if "val" in node.meta:
            like = node.meta["val"]
            node.meta["val"] = torch.empty_strided(like.shape, like.stride())
    return body
