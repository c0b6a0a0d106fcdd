"""What was found, in print and as JSON."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from typing import Any

from tabulate import tabulate

from benchmarks.about import about, one_line
from benchmarks.against.measure import Measured
from benchmarks.against.ratios import ENOUGH_PAIRS, LARGEST_MEDIAN, REACHED, Pair, Ratio, medians_of, ratio_of
from benchmarks.against.scenarios import Scenario

PROGRAM = "python -m benchmarks.against"


@dataclass(frozen=True)
class Row:
    """One quantity."""

    quantity: str
    here: float
    there: float
    ratio: Ratio
    passes: bool | None
    """Whether here is not slower; None: it is shown without a verdict."""
    pairs: list[list[Pair]]

    @property
    def text(self) -> str:
        """The quantity and its ratio."""
        ratio = self.ratio
        return f"{self.quantity}: {ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"


@dataclass(frozen=True)
class Report:
    """What is printed of a run."""

    scenario: Scenario
    options: argparse.Namespace
    commit: str
    """Of the tree there."""
    rows: list[Row]
    exact: dict[str, Pair]

    @property
    def passes(self) -> bool:
        return all(row.passes is not False for row in self.rows)

    @property
    def verdict(self) -> str:
        """In one line."""
        limit, more = self.options.limit, self.scenario.more
        if failed := [row for row in self.rows if row.passes is False]:
            return f"{more}: " + "; ".join(row.text for row in failed)
        if limit is not None:
            return f"not {more} than {limit:g} times: no median ratio is above it"
        return f"not {more}: each interval reaches down to {REACHED:.2f}, and no median ratio is above {LARGEST_MEDIAN}"

    def __str__(self) -> str:
        described = about(PROGRAM)
        lines = [one_line(described), f"\n    {described['command']}\n", self.scenario.question]
        lines += [f"Here: this working tree. There: {self.options.revision}, {self.commit[:10]}.\n", self._table()]
        num_pairs = self.options.starts * self.options.rounds
        lines.append(f"\nRatios of {self.options.starts} starts of {self.options.rounds} rounds.")
        if num_pairs < ENOUGH_PAIRS:
            lines.append(f"Fewer than {ENOUGH_PAIRS} pairs: the intervals are narrower than they should be.")
        if self.exact:
            rows = [[name, f"{here:g}", f"{there:g}"] for name, (here, there) in self.exact.items()]
            lines.append("\n" + _github(rows, ["counted", "here", "there"]))
        return "\n".join([*lines, "\n" + self.verdict])

    def _table(self) -> str:
        rows = [
            [
                row.quantity,
                f"{row.here:.4g}",
                f"{row.there:.4g}",
                f"{row.ratio.median:.3f}",
                f"{row.ratio.low:.3f} to {row.ratio.high:.3f}",
                "" if row.passes is None else f"{'not ' if row.passes else ''}{self.scenario.more}",
            ]
            for row in self.rows
        ]
        return _github(rows, ["median", "here", "there", "here / there", "95 % interval", "verdict"])

    def as_json(self) -> dict[str, Any]:
        """All of it, with every pair."""
        return {
            **about(PROGRAM),
            "scenario": self.options.scenario,
            "there": {"revision": self.options.revision, "commit": self.commit},
            "options": {**self.options.numbers, "starts": self.options.starts, "rounds": self.options.rounds},
            "rows": [asdict(row) for row in self.rows],
            "exact": self.exact,
            "passes": self.passes,
            "verdict": self.verdict,
        }


def report_of(scenario: Scenario, options: argparse.Namespace, commit: str, found: Measured) -> Report:
    """Put together what was measured."""
    rows: list[Row] = []
    for quantity, pairs in found.pairs.items():
        ratio = ratio_of(pairs)
        beside = bool(scenario.beside) and quantity.endswith(scenario.beside)
        passes = None if beside else ratio.passes(options.limit)
        rows.append(Row(quantity, *medians_of(pairs), ratio, passes, pairs))
    return Report(scenario, options, commit, rows, found.exact)


def _github(rows: list[list[str]], heads: list[str]) -> str:
    align = ["left", *["right"] * (len(heads) - 1)]
    return tabulate(rows, headers=heads, tablefmt="github", colalign=align, disable_numparse=True)
