"""Ranks of tensor parallelism, which get the same batch, compare what they traced of it."""

from collections.abc import Generator

from torch import fx

from fxzero.comm import agree
from fxzero.graph.nodes import Role, info, model_collective, role
from fxzero.graph.step import StepGraph
from fxzero.graph.verify import WAIT_OF_MODEL
from fxzero.module.sharded_model import ShardedModel


def compare_parts(sharded: ShardedModel, step: StepGraph) -> None:
    """Return once all ranks of tensor parallelism have traced the same collectives of the model; a collective.

    Raises:
        RankMismatchError: they differ, or a rank does something else.
    """
    if sharded.parallel:
        group = next(iter(sharded.parallel.values())).mesh.get_group()
        agree.agree(group, "tensor parallelism", list(_lines(step)), timeout=sharded.timeout)


def _lines(step: StepGraph) -> Generator[str]:
    for node in step.graph.nodes:
        if role(node) is Role.INPUT:
            yield f"input {info(node).fqn}: {_shape(node)}"
        elif (name := model_collective(node)) not in ("", WAIT_OF_MODEL):
            yield f"{name} of {info(node).fqn or 'the model'}"


def _shape(node: fx.Node) -> str:
    value = node.meta["val"]
    return f"{value.dtype} {list(value.shape)}"
