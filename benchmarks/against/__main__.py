"""The command line; see the package's docstring."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.against import __doc__ as purpose
from benchmarks.against.checkout import NoRevision, commit_of, two_trees
from benchmarks.against.measure import measure
from benchmarks.against.report import PROGRAM, report_of
from benchmarks.against.scenarios import SCENARIOS, Scenario
from benchmarks.network.testbed import CannotRunHere
from benchmarks.ranks import RankDied
from benchmarks.termination import clean_up_when_terminated


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=purpose, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(systems=[""], rates=[None], limit=None)
    parser.add_argument("revision", help="a commit, branch or tag to compare with")
    scenarios = parser.add_subparsers(dest="scenario", required=True)
    for name, scenario in SCENARIOS.items():
        _add_options(scenarios.add_parser(name, help=scenario.question, description=scenario.question), scenario)
    return parser


def _add_options(parser: argparse.ArgumentParser, scenario: Scenario) -> None:
    parser.add_argument("--starts", type=int, default=scenario.starts, help="new workers of both trees (%(default)s)")
    parser.add_argument("--rounds", type=int, default=scenario.rounds, help="turns of each, a start (%(default)s)")
    for name, number in scenario.numbers.items():
        parser.add_argument(f"--{name}", type=int, default=number, help="(%(default)s)")
    if scenario.rates:
        parser.add_argument("--rates", type=float, nargs="+", default=scenario.rates, help="Gbit/s (%(default)s)")
        parser.add_argument("--systems", nargs="+", choices=scenario.systems, default=scenario.systems)
    if scenario.has_limit:
        parser.add_argument("--limit", type=float, help="let medians of up to this pass, whatever their interval is")
    parser.add_argument("--check", action="store_true", help=f"exit with 1 if it is {scenario.more} here")
    parser.add_argument("--json", type=Path, help="write all pairs to this file, too")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of a run, where `numbers` are those of its workers."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    options.numbers = {name: getattr(options, name) for name in SCENARIOS[options.scenario].numbers}
    if min(options.starts, options.rounds) < 1:
        parser.error("There must be at least one start and one round.")
    if options.numbers.get("k", 2) < 2:
        parser.error("--k must be at least 2, as the first step of a turn is not counted.")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print.

    Returns:
        The exit status: with --check 1 if it is slower here, and 2 where nothing could be measured.
    """
    options = parse(arguments)
    scenario = SCENARIOS[options.scenario]
    try:
        commit = commit_of(options.revision)
        with two_trees(commit) as trees, TemporaryDirectory() as logs:
            found = measure(scenario, trees, options, Path(logs))
    except (NoRevision, CannotRunHere, RankDied) as error:
        print(error, file=sys.stderr)
        return 2
    report = report_of(scenario, options, commit, found)
    print(report)
    if options.json is not None:
        options.json.write_text(json.dumps(report.as_json(), indent=1) + "\n")
    return int(options.check and not report.passes)


if __name__ == "__main__":
    clean_up_when_terminated()
    sys.exit(main())
