"""The command line of `fxzero train`."""

import argparse
import dataclasses
import os
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias, cast

from fxzero.commands.errors import CommandError, report
from fxzero.commands.launch import launch, under_torchrun
from fxzero.commands.progress import Progress
from fxzero.commands.world import DEVICES, World, joined
from fxzero.errors import (
    CaptureError,
    CheckpointError,
    CommunicationError,
    IslandError,
    MissingExtraError,
    PlanError,
    RankMismatchError,
)
from fxzero.host.allocator import keep_freed_memory
from fxzero.host.extras import require
from fxzero.train.models import config_of
from fxzero.train.options import (
    MODELS,
    PRECISIONS,
    TrainOptions,
    flag_of,
    parse_budget,
    parse_recompute,
)
from fxzero.train.resume import AUTO, saved_options
from fxzero.train.toml_files import as_options, read_toml

_TOLD = (CommandError, CaptureError, CheckpointError, CommunicationError, IslandError, PlanError, RankMismatchError)
"""Errors that are told in a sentence, without a traceback."""
HELP = "train a model on real text, sharded over the ranks"
_DESCRIPTION = """\
Trains RoBERTa (masked language modelling), or a GPT or Llama (next token), on the sources of the Python standard
library or on your own text; or fine-tunes the model of a Hugging Face folder. Weights, tokenizer, metrics, a picture
of the loss and the step's schedule go to a folder.

  fxzero train                                      alone, one rank
  fxzero train --nproc 2                            two ranks on this machine
  torchrun --nproc-per-node 8 -m fxzero train --model gpt --data notes/
  fxzero train --hf DIR --lora 8 --data notes/      adapters for a Hugging Face model
  fxzero train --out RUN --save-every 100           writes checkpoints
  fxzero train --resume RUN                         goes on from the newest of them, with the same options
"""


_Option: TypeAlias = tuple[str, Callable[[str], Any], str | tuple[str, ...], str]
_OPTIONS: dict[str, tuple[_Option, ...]] = {
    "what is trained": (
        ("hf", Path, "DIR", "a local Hugging Face folder (config, safetensors, tokenizer) to fine-tune"),
        ("lora", int, "RANK", "train LoRA adapters of this rank for the linear layers of --hf, by peft"),
        ("model", str, MODELS, "the model"),
        ("preset", str, "NAME", "its size: micro, and those of fxzero.models"),
        ("data", Path, "PATH", "a text file or a folder of them (default: the standard library's sources)"),
        ("vocab_size", int, "N", "tokens of the BPE that is learned from the text; 261 is bytes"),
    ),
    "how": (
        ("steps", int, "N", "optimizer steps"),
        ("batch", int, "N", "sequences per rank"),
        ("accumulate", int, "N", "batches per rank and optimizer step"),
        ("precision", str, PRECISIONS, "the dtype of compute and of gathered parameters; fp16 scales its losses"),
        ("memory_budget", parse_budget, "BYTES", 'of a rank, such as 8GiB, or "auto": keep as much gathered as fits'),
        ("recompute", parse_recompute, "WHAT", "none, full, or the most BYTES of activations saved for backward"),
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
    "checkpoints": (
        ("save_every", int, "N", "steps between checkpoints, and one at the end; 0 writes none"),
        ("keep", int, "N", "checkpoints that are kept"),
        (
            "resume",
            str,
            "DIR",
            'a run or a checkpoint to go on from; "auto", or no DIR: that of --out, if there is one',
        ),
    ),
    "reports": (
        ("out", Path, "DIR", "a new or empty folder for the results (default: runs/MODEL-TIME)"),
        ("tensorboard", bool, "", "log to the folder tensorboard in --out as well"),
        ("config", Path, "FILE", "a TOML file with options by their names here; the command line wins"),
        ("eval_batches", int, "N", "held-out batches per rank at an evaluation"),
        ("eval_every", int, "N", "steps between evaluations; 0 is only before the first and after the last"),
        ("log_every", int, "N", "steps between lines of metrics"),
    ),
}
"""By title of the group: a field of TrainOptions, its type, its choices or the name of its value, and its help."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options. Those that are not given are no attributes of the parsed arguments."""
    parser.description = _DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    defaults = TrainOptions()
    for title, options in _OPTIONS.items():
        group = parser.add_argument_group(title)
        for name, kind, values, text in options:
            default = getattr(defaults, name)
            text = text if default is None or kind is bool else f"{text} (default: {default})"
            how: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text}
            if kind is bool:
                how |= {"action": argparse.BooleanOptionalAction}
            else:
                how |= {"type": kind, **({"metavar": values} if isinstance(values, str) else {"choices": values})}
            if name == "resume":
                how |= {"nargs": "?", "const": AUTO}
            group.add_argument(flag_of(name), **how)


def options_of(given: Mapping[str, Any]) -> TrainOptions:
    """The options of a run: those given on the command line, else of the file of --config, else of the resumed run.

    Raises:
        CommandError: a file cannot be read, or has something that is no option.
    """
    kinds = {name: kind for options in _OPTIONS.values() for name, kind, _, _ in options}
    chosen = dict(given)
    if (path := chosen.get("config")) is not None:
        with _readable("--config", path):
            chosen = as_options(path, read_toml(path), kinds) | chosen
    if (resume := chosen.get("resume")) is not None:
        with _readable("--resume", resume):
            before = saved_options(chosen.get("out"), resume)
        chosen = as_options(Path(resume), before, kinds) | chosen
    return TrainOptions(**chosen)


@contextmanager
def _readable(flag: str, path: object) -> Generator[None]:
    try:
        yield
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"{flag} {path} cannot be read: {getattr(error, 'strerror', None) or error}.") from error


def run(arguments: argparse.Namespace, argv: list[str], progress: Progress) -> int:
    """Train as asked.

    Args:
        arguments: the parsed options of `add_arguments`.
        argv: the command line, for ranks that are started here.
        progress: says what is going on until the first step.

    Returns:
        The exit status: 0; 2 if the user has to change something; 128 + signal if a signal ended the training early.
    """
    given = {field.name for field in dataclasses.fields(TrainOptions)}
    try:
        require("this command", "train")
        options = options_of({name: value for name, value in vars(arguments).items() if name in given})
        options.validate()
        if options.hf is None:
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
    except _TOLD as error:
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
