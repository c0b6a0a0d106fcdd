"""One run of `fxzero train` on one rank: text, training, results."""

import contextlib
import itertools
import signal
import sys
import threading
from collections.abc import Generator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from tqdm import tqdm

from fxzero.commands.errors import CommandError
from fxzero.commands.world import World
from fxzero.train.export import save_stream
from fxzero.train.loop import Trainer
from fxzero.train.models import WEIGHTS_FILE, write_config
from fxzero.train.options import TrainOptions
from fxzero.train.report import (
    METRICS_FILE,
    PICTURE_FILE,
    SCHEDULE_FILE,
    Metrics,
    draw_loss,
    format_summary,
    peak_memory_bytes,
)
from fxzero.train.text import read_text

TOKENIZER_FILE = "tokenizer.json"


@dataclass
class Stop:
    """The request to stop this rank."""

    signum: int = 0
    """The signal that asked for it; 0 for none."""


def run(options: TrainOptions, world: World) -> int:
    """Train with valid options, and write the results.

    Returns:
        The signal that ended the training early, or 0.

    Raises:
        CommandError: on every rank, if the options do not fit each other, the text or the machine.
    """
    world.share(options.check_files)
    say = _say if world.is_main else lambda text: None
    text = read_text(options, world)
    metrics = Metrics()
    trainer = Trainer(options, world, text, metrics)
    out = Path(world.share(lambda: str(_make_folder(options))))
    ranks = "1 rank" if world.size == 1 else f"{world.size} ranks"
    say(
        f"{text.about}\n{options.model} {options.preset}, {trainer.num_params / 1e6:.2f} M parameters, over {ranks} on "
        f"{world.device.type}: {options.steps} steps of {trainer.tokens_per_step} tokens, vocabulary {text.vocab_size}"
    )
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(_stop_on_signal())
        if world.is_main:
            text.tokenizer.save(str(out / TOKENIZER_FILE))
            write_config(out, options.model, options.preset, trainer.config)
            metrics.file = stack.enter_context((out / METRICS_FILE).open("w", encoding="utf-8"))
        trainer.train(lambda: stop.signum != 0)
        if trainer.step < options.steps:
            say(f"stopped after {trainer.step} of {options.steps} steps; writing what there is")
        _write_weights(trainer, out / WEIGHTS_FILE)
        peaks = world.gather(peak_memory_bytes(world.device))
        if world.is_main:
            schedule = str(trainer.schedule)
            (out / SCHEDULE_FILE).write_text(schedule + "\n", encoding="utf-8")
            draw_loss(metrics, f"{options.model} {options.preset}, {ranks}", out / PICTURE_FILE)
            say(format_summary(metrics, peaks, schedule, out))
    return stop.signum if trainer.step < options.steps else 0


def _say(text: str) -> None:
    """Print above the progress bar, and flush."""
    tqdm.write(text)
    sys.stdout.flush()


def _make_folder(options: TrainOptions) -> Path:
    """A new folder for the results, or the empty one that the user named."""
    out = options.out or Path("runs", f"{options.model}-{datetime.now():%Y%m%d-%H%M%S}")
    try:
        out.mkdir(parents=True, exist_ok=options.out is not None)
    except OSError as error:
        raise CommandError(f"--out {out} cannot be made: {error.strerror}.") from error
    return out


def _write_weights(trainer: Trainer, path: Path) -> None:
    """Gather the parameters one by one, each of which rank 0 writes; a collective."""
    stored = trainer.stored
    gathered = trainer.zero.iter_full_params(rank0_only=True)
    if not trainer.world.is_main:
        for _ in gathered:
            pass
        return
    parameters = ((name, tensor) for name, tensor in gathered if tensor is not None)
    buffers = ((name, tensor) for name, tensor in trainer.zero.named_buffers() if name in stored)
    save_stream(path, stored, itertools.chain(parameters, buffers), {"format": "pt", **trainer.tied})


@contextlib.contextmanager
def _stop_on_signal() -> Generator[Stop]:
    """The first Ctrl-C or SIGTERM asks to stop; a second Ctrl-C stops at once."""
    stop = Stop()

    def ask(signum: int, frame: object) -> None:
        if stop.signum and signum == signal.SIGINT:
            raise KeyboardInterrupt
        stop.signum = signum

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = {signum: signal.signal(signum, ask) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
