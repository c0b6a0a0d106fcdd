"""Seconds of planning against the number of layers: tracing, choosing from costs, the plan, the bound.

"plan" is all variants of a plan: passes, with a proof after each, offsets in the arena, and code.

Processor seconds, of one thread: what else a machine does counts little.

OMP_NUM_THREADS=1 python -m benchmarks.planning_time
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from benchmarks.about import heading
from fxzero.capture import capture
from fxzero.comm.gloo import GLOO
from fxzero.cost.choose_sizes import choose_sizes
from fxzero.cost.job_costs import CostModel, optimizer_bytes
from fxzero.cost.model import GBIT, Cluster, Device, Link
from fxzero.graph.devices import Devices
from fxzero.graph.recipe import Recipe
from fxzero.graph.schedule_text import format_schedule
from fxzero.graph.sharding import Sharding
from fxzero.graph.step import StepGraph
from fxzero.models import GPT, GPT_PRESETS, ROBERTA_PRESETS, RobertaForMaskedLM
from fxzero.planning.fix_layout import layout_of
from fxzero.planning.plan import make_plan, with_collectives
from fxzero.runtime.shards import spec_of

SIZES: Mapping[str, Any] = {"vocab_size": 8192, "max_positions": 130, "hidden_size": 512, "num_heads": 8}
"""Of a layer of 3.2M parameters: most sizes of buckets that are tried give other buckets."""
STATE_PER_ELEMENT = 2


def model_of(family: str, num_layers: int) -> nn.Module:
    """A model without weights."""
    with torch.device("meta"):
        if family == "gpt":
            return GPT(replace(GPT_PRESETS["tiny"], **SIZES, num_layers=num_layers))
        config = replace(ROBERTA_PRESETS["tiny"], **SIZES, ffn_size=4 * SIZES["hidden_size"], num_layers=num_layers)
        return RobertaForMaskedLM(config)


def measure(family: str, num_layers: int, cluster: Cluster, world_size: int) -> dict[str, float]:
    """Seconds of each part of planning one model, in the order in which they come."""
    model, ids = model_of(family, num_layers), torch.zeros(4, 128, dtype=torch.int64, device="meta")
    params = {fqn: spec_of(fqn, param) for fqn, param in model.named_parameters()}
    seconds: dict[str, float] = {}

    def timed(part: str, call: Callable[[], Any]) -> Any:
        began = time.process_time()
        returned = call()
        seconds[part] = time.process_time() - began
        return returned

    batch = {"input_ids": ids, "labels": ids}
    device, sharding = torch.device("cpu"), Sharding.over(world_size)
    captured = timed(
        "trace",
        lambda: capture(model, model.forward, (), batch, params, device=device, sharding=sharding, with_backward=True),
    )
    costs = CostModel(cluster, GLOO, optimizer_bytes(params.values(), sharding.shard_ranks, STATE_PER_ELEMENT))

    def choose(step: StepGraph, recipe: Recipe) -> Recipe:
        return choose_sizes(step, recipe, costs, keeps_free=True)

    recipe = timed("choose", lambda: choose(with_collectives(captured.step, Recipe()), Recipe()))
    plan = timed("plan", lambda: make_plan(captured, recipe, GLOO, Devices.all(device)))
    step, layout = plan.step, layout_of(plan.step, recipe)
    fixed = replace(recipe, buckets=tuple(bucket.fqns for bucket in layout.buckets))
    timed("choose again", lambda: choose(step, fixed))
    timing = timed("bound", lambda: costs.timing(step))
    timed("print", lambda: format_schedule(step))
    return {"nodes": len(step.graph.nodes), "buckets": len(layout.buckets), **seconds, "ratio": timing.ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 100, 200, 1000])
    parser.add_argument("--families", nargs="+", choices=("gpt", "roberta"), default=["gpt", "roberta"])
    parser.add_argument("--rates", type=float, nargs="+", default=[0.5, 2.0], help="of the link, in Gbit/s")
    parser.add_argument("--world-size", type=int, default=8)
    options = parser.parse_args()
    rows: list[dict[str, object]] = []
    for family in options.families:
        for num_layers in options.layers:
            for rate in options.rates:
                link = Link(rate * GBIT, latency_s=2e-4, cpu_s_per_byte=1e-9)
                found = measure(family, num_layers, Cluster(Device(9e10, 1e10, 5e-6), link), options.world_size)
                rows.append({"model": family, "layers": num_layers, "Gbit/s": rate, **found})
                print(tabulate(rows[-1:], headers="keys", floatfmt=".3g"), flush=True)
    print("\n" + heading("python -m benchmarks.planning_time"))
    print(tabulate(rows, headers="keys", tablefmt="github", floatfmt=".3g"))


if __name__ == "__main__":
    main()
