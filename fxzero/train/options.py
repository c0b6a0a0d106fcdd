"""The options of `fxzero train`, checked before anything starts."""

import math
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fxzero.commands.errors import CommandError
from fxzero.commands.world import DEVICES
from fxzero.errors import PlanError
from fxzero.planning.run_passes import check_dump_folder

_MOST = 2**31 - 1
"""Bound on every number of things."""
MODELS = ("roberta", "gpt", "llama")
"""The models that can be trained, by their modules' names in `fxzero.models`."""


@dataclass(frozen=True)
class TrainOptions:
    """The options of one run, the same on every rank."""

    model: str = "roberta"
    preset: str = "micro"
    data: Path | None = None
    """A text file or a folder of them; None is the Python standard library."""
    vocab_size: int = 261
    steps: int = 2000
    batch: int = 16
    """Sequences per rank and micro-step."""
    accumulate: int = 1
    seq: int = 64
    lr: float | None = None
    """The largest learning rate; None takes one that suits the size of the model."""
    warmup: int | None = None
    """Steps until the largest learning rate; None is a quarter of the steps."""
    weight_decay: float = 0.01
    clip: float = 1.0
    seed: int = 0
    out: Path | None = None
    eval_batches: int = 8
    """Held-out batches per rank at each evaluation."""
    eval_every: int = 200
    """Steps between evaluations, beside the one before the first step and the one after the last; 0: none between."""
    log_every: int = 10
    device: str = "auto"
    nproc: int | None = None
    """Ranks to start on this machine; None joins the ranks that there are."""

    def validate(self) -> None:
        """Raise CommandError for an option outside of its legal range."""
        _one_of("--model", self.model, MODELS)
        _one_of("--device", self.device, DEVICES)
        for name in ("steps", "batch", "accumulate", "eval_batches", "log_every"):
            _at_least(name, getattr(self, name), 1)
        for name in ("weight_decay", "eval_every"):
            _at_least(name, getattr(self, name), 0)
        _at_least("seq", self.seq, 8)
        _at_least("vocab_size", self.vocab_size, 261)
        if not -(2**63) <= self.seed < 2**64:
            raise CommandError(f"--seed {self.seed} must have at most 64 bits: from {-(2**63)} to {2**64 - 1}.")
        if self.nproc is not None:
            _at_least("nproc", self.nproc, 1)
        if self.warmup is not None:
            _at_least("warmup", self.warmup, 0)
        for name, value in (("lr", self.lr), ("clip", self.clip)):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise CommandError(f"{flag_of(name)} {value} must be a finite number above 0.")

    def check_files(self) -> None:
        """Raise CommandError if the text is missing or the folder for the results is not empty; for rank 0."""
        if self.data is not None:
            with _told("--data", self.data):
                if not self.data.exists():
                    raise CommandError(f"--data {self.data} does not exist. Give a text file, or a folder of them.")
                if not (self.data.is_dir() or self.data.is_file()):
                    raise CommandError(
                        f"--data {self.data} is a pipe or a device. Give a text file, or a folder of them."
                    )
        if self.out is not None:
            with _told("--out", self.out):
                if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
                    raise CommandError(
                        f"--out {self.out} exists already and is not empty. Choose another, or remove it."
                    )
        try:
            check_dump_folder()
        except PlanError as error:
            raise CommandError(str(error)) from error


def learning_rate(step: int, *, peak: float, warmup: int, steps: int) -> float:
    """The learning rate of a step: linear from 0 to `peak` over `warmup` steps, then a cosine to 0 at `steps`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def flag_of(name: str) -> str:
    """The command-line option of a field."""
    return "--" + name.replace("_", "-")


def _one_of(flag: str, value: str, legal: tuple[str, ...]) -> None:
    if value not in legal:
        raise CommandError(f"{flag} {value} is not known; choose one of: {', '.join(legal)}.")


def _at_least(name: str, value: float, least: int) -> None:
    if not value >= least:
        raise CommandError(f"{flag_of(name)} {value} must be at least {least}.")
    if value > _MOST:
        raise CommandError(f"{flag_of(name)} {value} must be at most {_MOST}.")


@contextmanager
def _told(flag: str, path: Path) -> Generator[None]:
    """Raise CommandError for a path that the system refuses in the block."""
    try:
        yield
    except OSError as error:
        raise CommandError(f"{flag} {path} cannot be used: {error.strerror}.") from error
