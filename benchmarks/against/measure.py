"""Start workers of both trees and let them take turns."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from benchmarks.against.checkout import Tree
from benchmarks.against.ratios import Pair
from benchmarks.against.scenarios import Scenario
from benchmarks.network.place import Loopback, free_port, in_places
from benchmarks.network.systems import SYSTEMS
from benchmarks.network.testbed import Network
from benchmarks.network.turns import Turns
from benchmarks.ranks import Ranks

_T = TypeVar("_T")


@dataclass
class Measured:
    """What was found, by quantity."""

    pairs: dict[str, list[list[Pair]]] = field(default_factory=lambda: defaultdict(list))
    """One list for each start, with a pair for each round."""
    exact: dict[str, Pair] = field(default_factory=dict[str, Pair])
    """What is the same whenever it is counted."""


def measure(scenario: Scenario, trees: Sequence[Tree], options: argparse.Namespace, logs: Path) -> Measured:
    """Measure both trees, here and there.

    Args:
        options: of the command line.
        logs: the folder for what workers write to stderr.

    Raises:
        RankDied: a worker ended or hung.
        CannotRunHere: the machine lacks what a throttled link needs.
    """
    with Network() if scenario.rates else nullcontext(Loopback(scenario.world_size)) as network:
        run = _Run(scenario, options, network, logs)
        for system in options.systems:
            for start in range(options.starts):
                run.start(trees, system, start)
                print(f"{time.strftime('%T')} start {start + 1} of {options.starts} {system}", file=sys.stderr)
    return run.found


@dataclass(frozen=True)
class _Run:
    scenario: Scenario
    options: argparse.Namespace
    network: Network | Loopback
    logs: Path
    found: Measured = field(default_factory=Measured)

    def start(self, trees: Sequence[Tree], system: str, start: int) -> None:
        """New workers of both trees, and all their turns."""
        self._set_rate(Turns.start_rate)
        with ExitStack() as alive:
            started = [self._workers(tree, system, alive) for tree in _in_turn(trees, start)]
            workers = _in_turn(started, start)
            for rate in self.options.rates:
                self._set_rate(rate)
                for quantity, pairs in self._rounds(workers, first=start).items():
                    where = f"{SYSTEMS[system].label} at {rate:g} Gbit/s: " if self.scenario.rates else ""
                    self.found.pairs[where + quantity].append(pairs)
            self.found.exact |= _paired([_largest(each.ask("exact")) for each in workers])

    def _workers(self, tree: Tree, system: str, alive: ExitStack) -> Ranks:
        command = ["env", *(f"{name}={value}" for name, value in self.scenario.environment.items()), sys.executable]
        command += ["-m", "benchmarks.against.workers", self.options.scenario, "--checkout", str(tree.checkout)]
        command += ["--options", json.dumps({**self.options.numbers, "system": system})]
        commands = in_places(command, self.network, free_port())
        workers = alive.enter_context(closing(Ranks(tree.name, commands, self.logs, root=tree.imports)))
        workers.wait_until_ready()
        return workers

    def _rounds(self, workers: Sequence[Ranks], first: int) -> dict[str, list[Pair]]:
        """By quantity a pair for each round; `first` says who begins the first."""
        pairs: dict[str, list[Pair]] = defaultdict(list)
        for turn in range(first, first + self.options.rounds):
            answers = [_largest(each.ask("turn")) for each in _in_turn(workers, turn)]
            for quantity, pair in _paired(_in_turn(answers, turn)).items():
                pairs[quantity].append(pair)
        return pairs

    def _set_rate(self, rate: float) -> None:
        if isinstance(self.network, Network):
            self.network.set_rate(rate)


def _in_turn(two: Sequence[_T], turn: int) -> list[_T]:
    """In one order and the other by turns; twice, it is the first again."""
    return list(two if turn % 2 == 0 else reversed(two))


def _largest(ranks: Sequence[dict[str, float]]) -> dict[str, float]:
    """Of each number the largest over the ranks: the others wait for that one."""
    return {quantity: max(rank[quantity] for rank in ranks) for quantity in ranks[0]}


def _paired(both: Sequence[dict[str, float]]) -> dict[str, Pair]:
    here, there = both
    return {quantity: (number, there[quantity]) for quantity, number in here.items()}
