"""The tables and the plot that a run is shown by."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks.about import one_line
from benchmarks.network.bound import least_traffic, lower_bound_s
from benchmarks.network.results import (
    LOSS_TOLERANCE,
    MIXED_SYSTEMS,
    MIXED_TOLERANCE,
    QUIET,
    Cell,
    Results,
    wrong_losses,
)
from benchmarks.network.systems import SYSTEMS, Policy
from benchmarks.network.turns import Turns

MIB = 2**20
_NOT_STEPS = ("wire",)
"""What is measured for the bound alone."""


def bound_of(results: Results, system: str, rate: float) -> float | None:
    """The lower bound of a system's policy at a rate; None if it has none or its costs were not measured.

    A system that sends less than its policy needs, as it keeps the last bucket from forward to backward say, is held to
    the bound for what it sends.
    """
    policy, mixed = SYSTEMS[system].policy, SYSTEMS[system].is_mixed
    costs, cell = results.costs(rate, mixed=mixed), results.of(system, rate)
    if costs is None or not policy.trains or not cell.samples:
        return None
    least = least_traffic(policy, results.sent_param_bytes(system), results.world_size)
    return lower_bound_s(costs, least.at_most(cell.median("sent_bytes")))


def write_report(results: Results, folder: Path, name: str = "network") -> list[Path]:
    """Write `name`.md and `name`.png into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    text, picture = folder / f"{name}.md", folder / f"{name}.png"
    plot(results, picture)
    text.write_text(markdown(results, picture.name))
    return [text, picture]


def markdown(results: Results, picture: str) -> str:
    """The whole report."""
    parts = [_heading(results), f"![step time against rate]({picture})", _summary(results)]
    parts += [_of_rate(results, rate) for rate in results.rates]
    parts += [_costs(results), _checks(results)]
    return "\n\n".join(parts) + "\n"


def _heading(results: Results) -> str:
    run = results.runs[0]
    turns, shape = run["turns"], run["turns"]["shape"]
    commands = "\n".join(f"    {line}" for line in dict.fromkeys(one["command"] for one in results.runs))
    model = f"{shape['layers']} layers of {shape['hidden']}, {results.param_bytes / 4e6:.1f}M parameters in fp32"
    return f"""# Steps on a slow network

{commands}

{one_line(run)}
{results.world_size} ranks, each in a network namespace, on a core of its own, with one thread.
A masked language model of {model}, batch {shape["batch"]} x {shape["seq"]} per rank, AdamW.
Turns of {turns["k"]} steps, the first not counted."""


def _summary(results: Results) -> str:
    """Step times alone."""
    rows: list[list[Any]] = []
    for system in dict.fromkeys(name for group in results.groups for name in results.systems(group)):
        if system not in _NOT_STEPS:
            cells = [results.of(system, rate) for rate in results.rates]
            rows.append([SYSTEMS[system].label, SYSTEMS[system].policy.value, *map(_median, cells)])
    heads = ["system", "policy", *(f"{rate:g} Gbit/s" for rate in results.rates)]
    explained = (
        "Median seconds of a step. Policy: `again` gathers parameters in forward and again in backward, `keep` keeps "
        "them until backward, `replicated` shards nothing, `silent` sends nothing."
    )
    return explained + "\n\n" + _table(rows, heads)


def _of_rate(results: Results, rate: float) -> str:
    heads = ["system", "s", "min s", "n", "wire MB", "/ least", "bound s", "/ bound", "exposed"]
    heads += ["predicted s", "main CPU s", "gloo CPU s", "peak MiB"]
    rows: list[list[Any]] = []
    for group in results.groups:
        base = results.cells.get((group, rate, "compute"))
        for system in results.systems(group):
            cell = results.cells.get((group, rate, system))
            if cell is not None and system not in _NOT_STEPS:
                rows.append([*_row(results, system, rate, cell, base), f"{results.peak_mib.get(system, 0):.0f}"])
    return f"## {rate:g} Gbit/s\n\n" + _table(rows, heads)


def _row(results: Results, system: str, rate: float, cell: Cell, base: Cell | None) -> list[str]:
    seconds, bound = cell.median("seconds"), bound_of(results, system, rate)
    compute = base.median("seconds") if base is not None else None
    return [
        SYSTEMS[system].label,
        _median(cell),
        f"{cell.least_s:.2f}",
        f"{len(cell.quiet)}/{len(cell.samples)}",
        f"{cell.median('sent_bytes') / 1e6:.0f}",
        _share_of_least(results, system, cell),
        "" if bound is None else f"{bound:.2f}",
        "" if bound is None else f"{seconds / bound:.2f}",
        "" if compute is None else f"{(seconds - compute) / compute:.2f}",
        _predicted(results, system, rate),
        f"{cell.median('main_cpu_s'):.2f}",
        f"{cell.median('other_cpu_s'):.2f}",
    ]


def _predicted(results: Results, system: str, rate: float) -> str:
    """What fxzero said a step would take at this rate, from its own measurements at the rate it started with."""
    predicted = results.facts.get(system, {}).get("predicted", {}).get(f"{rate:g}")
    return "" if predicted is None else f"{predicted:.2f}"


def _share_of_least(results: Results, system: str, cell: Cell) -> str:
    """The bytes sent, relative to the least that the policy needs."""
    sent = results.sent_param_bytes(system)
    least = least_traffic(SYSTEMS[system].policy, sent, results.world_size).total
    return f"{cell.median('sent_bytes') / least:.2f}" if least else ""


def _costs(results: Results) -> str:
    rows: list[list[str]] = []
    for rate, mixed in itertools.product(results.rates, (False, True)):
        if costs := results.costs(rate, mixed=mixed):
            rows.append(
                [
                    f"{rate:g}, bf16" if mixed else f"{rate:g}",
                    f"{costs.compute_s:.3f}",
                    f"{costs.forward_s:.3f}",
                    f"{costs.bytes_per_s * 8 / 1e9:.2f}",
                    f"{costs.cpu_s_per_byte * 1e9:.2f}",
                ]
            )
    explained = f"""\
`/ least` is relative to the least bytes that the policy needs, `/ bound` to the lower bound of a step for it; `exposed`
is what a step takes beyond the compute-only step of its group, relative to that. The bound is made of these costs,
measured in the same run: compute of fxzero's generated code with its collectives stubbed out, and a bare loop of gloo
messages in both directions. `n` counts the steps in which others took less than {QUIET:g} of a core, of all; medians
are of those, or of all and marked * if they are too few. `predicted s` is what fxzero says of its plan, which it made
in its first steps, at {Turns.start_rate:g} Gbit/s: of another rate it is told nothing but the rate."""
    heads = ["Gbit/s", "compute s", "of it forward s", "link Gbit/s", "CPU ns per byte"]
    return f"## Costs\n\n{explained}\n\n{_table(rows, heads)}"


def _checks(results: Results) -> str:
    lines = ["## Checks", ""]
    wrong = wrong_losses(results.losses)
    count = len(results.losses)
    if wrong:
        lines += [f"- **The loss of {system} is off by {by:.1e}.**" for system, by in wrong.items()]
    else:
        within = f"{LOSS_TOLERANCE:g}"
        if MIXED_SYSTEMS & results.losses.keys():
            within += f", those in bf16 to {MIXED_TOLERANCE:g},"
        lines.append(f"- The losses of {count} systems agree to {within} at every step.")
    for system, why in results.failures.items():
        lines.append(f"- {system} failed: {why.splitlines()[0]}")
    return "\n".join(lines)


def _median(cell: Cell) -> str:
    return f"{cell.median('seconds'):.2f}{'*' if cell.disturbed else ''}" if cell.samples else ""


def _table(rows: Sequence[Sequence[Any]], heads: Sequence[str]) -> str:
    left = 2 if heads[1] == "policy" else 1
    align = ["left" if column < left else "right" for column in range(len(heads))]
    return tabulate(rows, headers=heads, tablefmt="github", colalign=align if rows else None, disable_numparse=True)


_MARKERS = {Policy.AGAIN: "o", Policy.KEEP: "s", Policy.REPLICATED: "^", Policy.SILENT: "."}
_BOUND_STYLES = {Policy.AGAIN: "--", Policy.KEEP: ":"}


def plot(results: Results, path: Path) -> None:
    """Step time against rate, both logarithmic, with the bounds of the two policies."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    rates = results.rates
    for system in dict.fromkeys(name for group in results.groups for name in results.systems(group)):
        if system in _NOT_STEPS:
            continue
        there = [(rate, results.of(system, rate)) for rate in rates]
        points = [(rate, cell.median("seconds")) for rate, cell in there if cell.samples]
        ours = system.startswith("fxzero")
        policy = SYSTEMS[system].policy
        axes.plot(
            *zip(*points, strict=True), marker=_MARKERS[policy], linewidth=2.4 if ours else 1.0,
            label=SYSTEMS[system].label, zorder=3 if ours else 2,
        )  # fmt: skip
    for policy, style in _BOUND_STYLES.items():
        costs = [(rate, results.costs(rate)) for rate in rates]
        traffic = least_traffic(policy, results.param_bytes, results.world_size)
        points = [(rate, lower_bound_s(cost, traffic)) for rate, cost in costs if cost is not None]
        if points:
            axes.plot(*zip(*points, strict=True), style, color="black", label=f"lower bound, {policy.value}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(rates)
    low, high = axes.get_ylim()
    axes.set_yticks([tick for tick in (0.25, 0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 16) if low <= tick <= high])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _position: f"{value:g}"))
        axis.set_minor_locator(NullLocator())
    axes.invert_xaxis()
    axes.set_xlabel("link, Gbit/s")
    axes.set_ylabel("seconds per step, median")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper left")
    figure.savefig(path, dpi=150)
