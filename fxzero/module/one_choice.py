"""A choice about the plans of a model that all ranks make alike, whatever shapes they met."""

from __future__ import annotations

from fxzero.comm import agree
from fxzero.graph.recipe import Recipe
from fxzero.module.sharded_model import ShardedModel


def exchange_recipes(sharded: ShardedModel, own: Recipe, topic: str) -> list[Recipe]:
    """The recipe that each rank would take, in rank order; a collective."""
    lines = agree.exchange(sharded.group, topic, [own.to_json()], timeout=sharded.timeout)
    return [Recipe.from_json(line) for (line,) in lines]
