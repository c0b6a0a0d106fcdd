"""The options of `fxzero train`, checked before anything starts."""

import math
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from fxzero.commands.errors import CommandError
from fxzero.commands.world import DEVICES
from fxzero.errors import PlanError
from fxzero.host.extras import require
from fxzero.planning.run_passes import check_dump_folder
from fxzero.train.hf_folder import check_folder
from fxzero.train.resume import check_out

_MOST = 2**31 - 1
"""Bound on every number of things."""
MODELS = ("roberta", "gpt", "llama")
"""The models that can be trained, by their modules' names in `fxzero.models`."""
PRECISIONS = ("fp32", "bf16", "fp16")
_OF_ONE_START = ("out", "device", "nproc", "resume", "config")
_OF_REFERENCE_MODELS = ("model", "preset", "vocab_size")
_UNITS = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}


def parse_bytes(text: str) -> int:
    """A number of bytes: "1000", "512M", "1.5 GiB"; units are powers of 1024.

    Raises:
        ValueError: it is none.
    """
    number = text.strip().lower().removesuffix("b").removesuffix("i")
    unit = number[-1:] if number[-1:] in _UNITS else ""
    nbytes = int(float(number.removesuffix(unit)) * 2 ** _UNITS[unit])
    if nbytes <= 0:
        raise ValueError(text)
    return nbytes


def parse_budget(text: str) -> int | Literal["auto"]:
    """The value of --memory-budget."""
    return "auto" if text == "auto" else parse_bytes(text)


def parse_recompute(text: str) -> int | Literal["none", "full"]:
    """The value of --recompute."""
    return text if text == "none" or text == "full" else parse_bytes(text)


@dataclass(frozen=True)
class TrainOptions:
    """The options of one run, the same on every rank."""

    hf: Path | None = None
    """A local Hugging Face folder, whose model is trained in the place of a reference model."""
    lora: int | None = None
    """The rank of adapters that are trained in the place of the model of `hf`."""
    model: str = "roberta"
    preset: str = "micro"
    data: Path | None = None
    """A text file or a folder of them; None is the Python standard library."""
    vocab_size: int = 261
    steps: int = 2000
    batch: int = 16
    """Sequences per rank and micro-step."""
    accumulate: int = 1
    """Micro-steps of an optimizer step."""
    precision: str = "fp32"
    """The dtype of compute; shards and the optimizer stay in fp32."""
    memory_budget: int | Literal["auto"] | None = None
    recompute: int | Literal["none", "full"] = "none"
    seq: int = 64
    lr: float | None = None
    """The largest learning rate; None takes one that suits the size of the model."""
    warmup: int | None = None
    """Steps until the largest learning rate; None is a quarter of the steps."""
    weight_decay: float = 0.01
    clip: float = 1.0
    seed: int = 0
    out: Path | None = None
    save_every: int = 0
    """Steps between checkpoints; 0: none are written."""
    keep: int = 2
    """Checkpoints that are kept."""
    resume: str | None = None
    """A folder of a run or of a checkpoint, or "auto": the newest checkpoint in `out` if there is one."""
    config: Path | None = None
    """The file that options were read from."""
    tensorboard: bool = False
    eval_batches: int = 8
    """Held-out batches per rank at each evaluation."""
    eval_every: int = 200
    """Steps between evaluations, beside the one before the first step and the one after the last; 0: none between."""
    log_every: int = 10
    device: str = "auto"
    nproc: int | None = None
    """Ranks to start on this machine; None joins the ranks that there are."""

    def to_keep(self) -> dict[str, Any]:
        """The options that a run takes over which goes on with this one."""
        return {name: value for name, value in asdict(self).items() if name not in _OF_ONE_START}

    def validate(self) -> None:
        """Raise CommandError for an option outside of its legal range."""
        _one_of("--model", self.model, MODELS)
        _one_of("--device", self.device, DEVICES)
        _one_of("--precision", self.precision, PRECISIONS)
        for name in ("steps", "batch", "accumulate", "eval_batches", "log_every", "keep"):
            _at_least(name, getattr(self, name), 1)
        for name in ("weight_decay", "eval_every", "save_every"):
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
        self._validate_hugging_face()
        if self.resume == "auto" and self.out is None:
            raise CommandError("--resume auto goes on with the run in the folder of --out; give one, or --resume DIR.")
        if self.tensorboard:
            require("--tensorboard", "tensorboard")

    def _validate_hugging_face(self) -> None:
        if self.hf is None:
            if self.lora is not None:
                raise CommandError(f"--lora {self.lora} adapts the model of a Hugging Face folder; give it with --hf.")
            return
        require("--hf", "hf", "transformers")
        others = [name for name in _OF_REFERENCE_MODELS if getattr(self, name) != getattr(TrainOptions, name)]
        if others:
            raise CommandError(f"--hf brings its own model and tokenizer; leave out {', '.join(map(flag_of, others))}.")
        if self.lora is not None:
            _at_least("lora", self.lora, 1)
            require("--lora", "hf", "peft")

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
        if self.hf is not None:
            with _told("--hf", self.hf):
                check_folder(self.hf)
        if self.out is not None:
            with _told("--out", self.out):
                check_out(self.out, self.resume)
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
