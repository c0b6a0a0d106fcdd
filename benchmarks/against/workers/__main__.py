"""One rank of one tree: `python -m benchmarks.against.workers SCENARIO ...`, from the tree's folder of imports."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.network.place import add_place, take_place
from benchmarks.ranks import serve


def check_origin(file: str | None, checkout: Path) -> None:
    """Refuse to measure another fxzero than that of the tree.

    Raises:
        SystemExit: `file`, of the package, is not the checkout's.
    """
    wanted = checkout / "fxzero" / "__init__.py"
    if file is None or Path(file).resolve() != wanted.resolve():
        raise SystemExit(f"fxzero is {file}; to be measured is {wanted}.")


def start() -> tuple[dict[str, str], dict[str, Callable[[], Any]]]:
    parser = argparse.ArgumentParser()
    parser.add_argument("scenario")
    parser.add_argument("--checkout", type=Path, required=True)
    parser.add_argument("--options", type=json.loads, required=True)
    add_place(parser)
    arguments = parser.parse_args()
    if arguments.world_size > 1:
        take_place(arguments)
    import fxzero

    check_origin(fxzero.__file__, arguments.checkout)
    work = import_module(f"benchmarks.against.workers.{arguments.scenario}").prepare(arguments, arguments.options)
    return {}, {"turn": work.turn, "exact": work.exact}


if __name__ == "__main__":
    serve(start)
