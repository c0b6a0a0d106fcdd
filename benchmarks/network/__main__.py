"""The command line; see the package's docstring."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.network import __doc__ as purpose
from benchmarks.network.results import read
from benchmarks.network.systems import SYSTEMS, Shape
from benchmarks.network.testbed import CannotRunHere, check
from benchmarks.network.turns import Turns, chosen, run, with_compute
from benchmarks.termination import clean_up_when_terminated

RESULTS = Path(__file__).parents[1] / "results"
RAW = Path("benchmarks/raw/network.jsonl")
"""Git ignores the folder."""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.network",
        description=purpose,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Systems:\n" + "\n".join(f"  {name:16} {system.label}" for name, system in SYSTEMS.items()),
    )
    commands = parser.add_subparsers(dest="command", required=True)
    more = commands.add_parser("run", help="measure")
    which = more.add_mutually_exclusive_group()
    which.add_argument("--systems", nargs="+", choices=list(SYSTEMS), help="of the usual groups only these")
    which.add_argument("--groups", nargs="+", help="systems that are alive together, as a,b,c: 2 to 4 GB each")
    more.add_argument("--rates", nargs="+", type=float, default=Turns.rates, help="Gbit/s (default: %(default)s)")
    more.add_argument("--k", type=int, default=Turns.k, help="steps of a turn; the first is not counted (%(default)s)")
    more.add_argument("--rounds", nargs="+", type=int, default=Turns.rounds, help="turns, for each rate or for all")
    more.add_argument("--warmup", type=int, default=Turns.warmup, help="steps before anything (%(default)s)")
    more.add_argument("--world-size", type=int, default=Turns.world_size, help="ranks (%(default)s)")
    more.add_argument("--default-malloc", action="store_true", help="no system keeps freed memory")
    more.add_argument("--simple-fsdp", type=Path, help="simple_fsdp.py of torchtitan 0.3.0; or set SIMPLE_FSDP")
    for name in Shape.__dataclass_fields__:
        more.add_argument(f"--{name}", type=int, default=getattr(Shape, name), help="(%(default)s)")
    more.add_argument("--out", type=Path, default=RAW, help="raw results are appended (%(default)s)")
    more = commands.add_parser("report", help="write the tables and the plot of raw results")
    more.add_argument("files", nargs="+", type=Path)
    more.add_argument("--folder", type=Path, default=RESULTS, help="(%(default)s)")
    more.add_argument("--name", default="network", help="of the files written, without their ending (%(default)s)")
    commands.add_parser("check", help="say whether it can run here")
    return parser


def turns_of(arguments: argparse.Namespace) -> Turns:
    """What the options of `run` ask for.

    Raises:
        ValueError: they do not make sense.
    """
    groups = with_compute([group.split(",") for group in arguments.groups]) if arguments.groups else None
    options = ["--default-malloc"] if arguments.default_malloc else []
    if arguments.simple_fsdp is not None:
        options += ["--simple-fsdp", str(arguments.simple_fsdp.resolve())]
    return Turns(
        groups=chosen(arguments.systems) if groups is None else groups,
        rates=tuple(arguments.rates),
        rounds=tuple(arguments.rounds),
        k=arguments.k,
        warmup=arguments.warmup,
        shape=Shape(**{name: getattr(arguments, name) for name in Shape.__dataclass_fields__}),
        world_size=arguments.world_size,
        rank_options=options,
    )


def main() -> None:
    parser = make_parser()
    arguments = parser.parse_args()
    clean_up_when_terminated()  # of namespaces
    try:
        if arguments.command == "run":
            run(turns_of(arguments), arguments.out)
        elif arguments.command == "check":
            check()
            print("The network benchmark can run here.")
        else:
            from benchmarks.network.report import write_report

            print(*write_report(read(arguments.files), arguments.folder, arguments.name), sep="\n")
    except CannotRunHere as error:
        sys.exit(str(error))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
