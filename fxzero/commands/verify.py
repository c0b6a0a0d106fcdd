"""The command line of `fxzero verify`: a user's model, compiled, against plain PyTorch."""

import argparse
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxzero import torch_internals
from fxzero.commands.errors import CommandError, report
from fxzero.commands.verification import verify_call
from fxzero.commands.world import DEVICES, World, run_on_ranks
from fxzero.errors import FxzeroError
from fxzero.planner import as_arguments

HELP = "compare your model, compiled, with plain PyTorch: loss, gradients, an optimizer step"
_DESCRIPTION = """\
Calls a function of yours that returns (model, batch) or (model, args, kwargs), and compares. The exit status is 0 if
all numbers are equal, and 1 if any differs. Random states are seeded before the call, equally on all ranks.

  fxzero verify my_package.my_module:build
  fxzero verify train.py:build --nproc 2            two ranks; RANK in the environment tells them apart
  torchrun --nproc-per-node 4 -m fxzero verify my_module:build
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = _DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("build", metavar="MODULE:FUNCTION", help="a function, in a module or in a file")
    parser.add_argument("--nproc", type=int, metavar="N", help="start this many ranks on this machine")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="auto is a GPU where there are enough")
    parser.add_argument("--tolerance", type=float, default=0.0, help="how far numbers may differ, relative")


def run(arguments: argparse.Namespace, argv: list[str]) -> int:
    """Compare and print; returns the exit status."""
    return run_on_ranks("verify", arguments, argv, _run)


def _run(arguments: argparse.Namespace, world: World) -> int:
    torch.manual_seed(0)
    try:
        model, args, kwargs = _built(_find(arguments.build)())
        moved = torch_internals.tree_map_only(torch.Tensor, lambda tensor: tensor.to(world.device), (args, kwargs))
        result = verify_call(model.to(world.device), moved, tolerance=arguments.tolerance, options={})
    except (CommandError, FxzeroError, ValueError) as error:
        return report("verify", CommandError(str(error)))
    if world.is_main:
        print(result, flush=True)
    return 0 if result.ok else 1


def _find(spec: str) -> Callable[[], Any]:
    """The function that `module:function` or `file.py:function` names."""
    where, _, name = spec.rpartition(":")
    if not where or not name:
        raise CommandError(f"{spec!r} must name a function: my_package.my_module:build, or file.py:build.")
    sys.path.insert(0, os.getcwd())
    try:
        module = _of_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise CommandError(f"{where} cannot be imported: {error}.") from error
    found = getattr(module, name, None)
    if not callable(found):
        raise CommandError(f"{where} has no function {name}.")
    return found


def _of_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _built(built: Any) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    parts = built if isinstance(built, tuple) else ()
    if len(parts) == 2 and isinstance(parts[0], nn.Module):
        return (parts[0], *as_arguments(parts[1]))
    if len(parts) == 3 and isinstance(parts[0], nn.Module) and isinstance(parts[2], dict):
        return parts[0], tuple(parts[1]), parts[2]
    raise CommandError("The function must return (model, batch) or (model, args, kwargs), with an nn.Module first.")
