"""The command line of `fxzero train`."""

import argparse
import dataclasses
import os
from pathlib import Path
from typing import Any, cast

from fxzero.commands.errors import CommandError, report
from fxzero.commands.launch import launch, under_torchrun
from fxzero.commands.progress import Progress
from fxzero.commands.world import DEVICES, World, joined
from fxzero.errors import MissingExtraError
from fxzero.host.allocator import keep_freed_memory
from fxzero.host.extras import require
from fxzero.train.models import config_of
from fxzero.train.options import MODELS, TrainOptions, flag_of

HELP = "train a reference model on real text, sharded over the ranks"
_DESCRIPTION = """\
Trains RoBERTa (masked language modelling), or a GPT or Llama (next token), on the sources of the Python standard
library or on your own text. Weights, tokenizer, metrics, a picture of the loss and the step's schedule go to a folder.

  fxzero train                          alone, one rank
  fxzero train --nproc 2                two ranks on this machine
  torchrun --nproc-per-node 8 -m fxzero train --model gpt --data notes/
"""


_OPTIONS: dict[str, tuple[tuple[str, type[Any], str | tuple[str, ...], str], ...]] = {
    "what is trained": (
        ("model", str, MODELS, "the model"),
        ("preset", str, "NAME", "its size: micro, and those of fxzero.models"),
        ("data", Path, "PATH", "a text file or a folder of them (default: the standard library's sources)"),
        ("vocab_size", int, "N", "tokens of the BPE that is learned from the text; 261 is bytes"),
    ),
    "how": (
        ("steps", int, "N", "optimizer steps"),
        ("batch", int, "N", "sequences per rank"),
        ("accumulate", int, "N", "batches per rank and optimizer step"),
        ("seq", int, "N", "tokens per sequence"),
        ("lr", float, "X", "largest learning rate, of AdamW (default: 3e-3 for micro, less for larger ones)"),
        ("warmup", int, "N", "steps until it is reached; then it falls as a cosine (default: a quarter of the steps)"),
        ("weight_decay", float, "X", "of matrices and tables"),
        ("clip", float, "X", "largest norm of the gradient"),
        ("seed", int, "N", "of weights, order, masks and dropout"),
    ),
    "where": (
        ("nproc", int, "N", "start this many ranks on this machine (default: join those there are, or be alone)"),
        ("device", str, DEVICES, "auto is a GPU for each rank where there are enough, else the CPU"),
    ),
    "reports": (
        ("out", Path, "DIR", "a new or empty folder for the results (default: runs/MODEL-TIME)"),
        ("eval_batches", int, "N", "held-out batches per rank at an evaluation"),
        ("eval_every", int, "N", "steps between evaluations; 0 is only before the first and after the last"),
        ("log_every", int, "N", "steps between lines of metrics"),
    ),
}
"""By title of the group: a field of TrainOptions, its type, its choices or the name of its value, and its help."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options; their defaults are those of TrainOptions."""
    parser.description = _DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    defaults = TrainOptions()
    for title, options in _OPTIONS.items():
        group = parser.add_argument_group(title)
        for name, kind, values, text in options:
            flag, default = flag_of(name), getattr(defaults, name)
            text = text if default is None else f"{text} (default: {default})"
            if isinstance(values, str):
                group.add_argument(flag, type=kind, default=default, metavar=values, help=text)
            else:
                group.add_argument(flag, type=kind, default=default, choices=values, help=text)


def run(arguments: argparse.Namespace, argv: list[str], progress: Progress) -> int:
    """Train as asked.

    Args:
        arguments: the parsed options of `add_arguments`.
        argv: the command line, for ranks that are started here.
        progress: says what is going on until the first step.

    Returns:
        The exit status: 0; 2 if the user has to change something; 128 + signal if a signal ended the training early.
    """
    options = TrainOptions(**{each.name: getattr(arguments, each.name) for each in dataclasses.fields(TrainOptions)})
    try:
        require("this command", "train")
        options.validate()
        config_of(options.model, options.preset, options.seq)
        if _starts_ranks(options):
            options.check_files()
            progress.at(f"starting {options.nproc} ranks")
            progress.stop()  # the first of them goes on
            return launch(cast(int, options.nproc), argv)
        keep_freed_memory()
        if under_torchrun():
            progress.at("meeting the other ranks")
        with joined(options.device) as world:
            return _run(options, world, progress)
    except (CommandError, MissingExtraError) as error:
        return report("train", error)


def _run(options: TrainOptions, world: World, progress: Progress) -> int:
    from fxzero.train import job  # imports the libraries of the extra, which other commands can do without

    try:
        signum = job.run(options, world, progress)
    except CommandError as error:
        return report("train", error)  # before the ranks part: the first one to end ends the others
    return 128 + signum if signum else 0


def _starts_ranks(options: TrainOptions) -> bool:
    """True if this process is to start ranks, False if it is to be a rank."""
    if options.nproc is None or not under_torchrun():
        return (options.nproc or 1) > 1
    started = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if started != options.nproc:
        raise CommandError(f"--nproc {options.nproc}, but {started} ranks were started on this machine; leave it out.")
    return False
