"""One run of `fxzero train` on one rank: text, training, results."""

import contextlib
import itertools
import sys
from collections.abc import Generator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from tqdm import tqdm

from fxzero.checkpoint.files import CHECKPOINTS
from fxzero.checkpoint.safetensors import give_back_room, reserve_room, save_stream
from fxzero.commands.errors import CommandError
from fxzero.commands.progress import Progress
from fxzero.commands.signals import StopRequest
from fxzero.commands.world import World
from fxzero.train.loop import Trainer
from fxzero.train.models import WEIGHTS_FILE
from fxzero.train.options import TrainOptions
from fxzero.train.report import (
    METRICS_FILE,
    PICTURE_FILE,
    SCHEDULE_FILE,
    Metrics,
    draw_loss,
    format_summary,
    peak_memory_bytes,
    read_metrics,
)
from fxzero.train.resume import checkpoint_of, run_folder, write_options
from fxzero.train.stopping import AgreedStop
from fxzero.train.subject import TOKENIZER_FILE, Subject, make_subject
from fxzero.train.text import Text, read_text

BOARD_FOLDER = "tensorboard"


def run(options: TrainOptions, world: World, progress: Progress) -> int:
    """Train with valid options, and write the results.

    Returns:
        The signal that ended the training early, or 0.

    Raises:
        CommandError: on every rank, if the options do not fit each other, the text or the machine, or if results
            cannot be written.
    """
    world.share(options.check_files)
    checkpoint = world.share(lambda: _text_of(checkpoint_of(options.out, options.resume)))
    say = _say if world.is_main else lambda text: None
    progress.at("reading the text and learning its tokens")
    text = read_text(options, world)
    progress.at("building the model")
    metrics = Metrics()
    subject = make_subject(options, text)
    trainer = Trainer(options, world, text, subject, metrics, say)
    out = Path(world.share(lambda: str(_make_folder(options))))
    results = Results(out, options, trainer, text)
    if checkpoint is not None:
        progress.at(f"loading {checkpoint}")
    trainer.begin(None if checkpoint is None else Path(checkpoint))
    ranks = "1 rank" if world.size == 1 else f"{world.size} ranks"
    say(
        f"{text.about}\n{subject.name}, {trainer.num_params / 1e6:.2f} M parameters, over {ranks} on "
        f"{world.device.type}: {options.steps} steps of {trainer.tokens_per_step} tokens, vocabulary {text.vocab_size}"
    )
    if checkpoint is not None:
        say(f"going on after step {trainer.step}, from {checkpoint}")
    request = StopRequest()
    stops = AgreedStop(world, request)
    with contextlib.ExitStack() as stack:
        stack.callback(metrics.close)
        stack.callback(results.give_back_room)
        world.share(lambda: results.begin(metrics, checkpoint))

        def started() -> None:
            progress.stop()
            stack.enter_context(request.listening())

        progress.at("tracing and planning the first steps")
        trainer.checkpoints = out / CHECKPOINTS if options.save_every else None
        trainer.train(started, stops)
        progress.stop()  # also where no step was left
        if trainer.step < options.steps:
            say(f"stopped after {trainer.step} of {options.steps} steps; writing what there is")
        results.write_weights()
        peaks = world.gather(peak_memory_bytes(world.device))
        schedule = str(trainer.schedule or trainer.zero.schedule)
        world.share(lambda: results.write_reports(metrics, schedule, f"{subject.name}, {ranks}"))
        say(format_summary(metrics, peaks, schedule, results.out))
        world.share(lambda: results.complete(metrics))
    return stops.signum if trainer.step < options.steps else 0


def _say(text: str) -> None:
    """Print above the progress bar, and flush."""
    tqdm.write(text)
    sys.stdout.flush()


def _text_of(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _make_folder(options: TrainOptions) -> Path:
    """A new folder for the results, the empty one that the user named, or that of the run that goes on."""
    name = options.model if options.hf is None else options.hf.absolute().name
    out = options.out or Path("runs", f"{name}-{datetime.now():%Y%m%d-%H%M%S}")
    if options.out is None and options.resume is not None:
        return run_folder(options.resume)
    try:
        out.mkdir(parents=True, exist_ok=options.out is not None)
    except OSError as error:
        raise CommandError(f"--out {out} cannot be made: {error.strerror}.") from error
    return out


@dataclass
class Results:
    """The files of a run in its folder, which rank 0 writes; what cannot be written is a CommandError."""

    out: Path
    options: TrainOptions
    trainer: Trainer
    text: Text

    @property
    def _subject(self) -> Subject:
        return self.trainer.subject

    def begin(self, metrics: Metrics, checkpoint: str | None) -> None:
        """Write what is known before training, and take the room that the weights will need."""
        with self._writing(f"{WEIGHTS_FILE} and what comes with it", "Nothing was trained."):
            self._subject.write_beside(self.out, self.text)
            if self.options.save_every:
                write_options(self.out, self.options.to_keep())
            self._begin_metrics(metrics, checkpoint)
            reserve_room(self.out / WEIGHTS_FILE, self._subject.announced, self._subject.metadata)

    def _begin_metrics(self, metrics: Metrics, checkpoint: str | None) -> None:
        """Open the files of the metrics; those of a run that goes on stay, up to the step from which it does."""
        step = self.trainer.step
        before = [] if checkpoint is None else read_metrics(run_folder(checkpoint) / METRICS_FILE, step)
        metrics.file = (self.out / METRICS_FILE).open("w", encoding="utf-8")
        for entry in before:
            metrics.add(entry)
        if self.options.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            metrics.board = SummaryWriter(str(self.out / BOARD_FOLDER), purge_step=step + 1)

    def give_back_room(self) -> None:
        """Leave nothing of weights that were not written."""
        if self.trainer.world.is_main:
            with contextlib.suppress(OSError):
                give_back_room(self.out / WEIGHTS_FILE)

    def write_weights(self) -> None:
        """Gather the parameters one by one, each of which rank 0 writes; a collective."""
        trainer, subject, path = self.trainer, self._subject, self.out / WEIGHTS_FILE
        subject.prepare(trainer.zero)
        gathered = trainer.zero.iter_full_params(rank0_only=True)
        failure: CommandError | None = None
        if trainer.world.is_main:
            parameters = ((name, tensor) for name, tensor in gathered if tensor is not None)
            tensors = subject.to_write(itertools.chain(parameters, trainer.zero.named_buffers()))
            try:
                with self._writing(WEIGHTS_FILE, "The weights are lost."):
                    save_stream(path, subject.announced, tensors, subject.metadata)
                    subject.write_more(self.out)
            except CommandError as error:
                failure = error
        for _ in gathered:  # the other ranks take part in each, and so does rank 0 after a failure
            pass
        trainer.world.share(lambda: _raise(failure))

    def write_reports(self, metrics: Metrics, schedule: str, title: str) -> None:
        """Write the checksums of the weights and their tokenizer, the schedule and the picture of the loss."""
        with self._writing("a report", f"{WEIGHTS_FILE} is complete."):
            self._subject.write_beside(self.out, self.text, (TOKENIZER_FILE, WEIGHTS_FILE))
            (self.out / SCHEDULE_FILE).write_text(schedule + "\n", encoding="utf-8")
            draw_loss(metrics, title, self.out / PICTURE_FILE)

    def complete(self, metrics: Metrics) -> None:
        """Write the checksums of all files, after the last of them was written."""
        metrics.close()
        with self._writing("a report", f"{WEIGHTS_FILE} is complete."):
            if metrics.failure is not None:
                raise metrics.failure
            files = TOKENIZER_FILE, WEIGHTS_FILE, SCHEDULE_FILE, PICTURE_FILE, METRICS_FILE
            self._subject.write_beside(self.out, self.text, files)

    @contextlib.contextmanager
    def _writing(self, what: str, so_far: str) -> Generator[None]:
        try:
            yield
        except OSError as error:
            raise CommandError(
                f"{what} cannot be written to {self.out}: {error.strerror or error}. {so_far} Make room, or choose "
                "another folder with --out."
            ) from error


def _raise(failure: CommandError | None) -> None:
    if failure is not None:
        raise failure
