"""The training loop: an ordinary one of PyTorch, except for the line that compiles the model."""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy
from tqdm import tqdm

import fxzero
from fxzero.commands.errors import CommandError
from fxzero.commands.world import World
from fxzero.errors import FxzeroError, RankMismatchError
from fxzero.graph.names import format_bytes
from fxzero.train.batches import IGNORED, Batches, BatchStream, Windows, generator_of
from fxzero.train.options import TrainOptions, learning_rate
from fxzero.train.report import HeldOutMetrics, Metrics, StepMetrics
from fxzero.train.subject import Subject
from fxzero.train.text import Text


class Trainer:
    """The model, its optimizer and its data on one rank."""

    def __init__(
        self,
        options: TrainOptions,
        world: World,
        text: Text,
        subject: Subject,
        metrics: Metrics,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Build everything; nothing is traced before the first step.

        Args:
            say: prints a line, on rank 0.

        Raises:
            CommandError: the text is too short for the options.
        """
        self.options = options
        self.world = world
        self.metrics = metrics
        self.subject = subject
        self._say = say
        self.step = 0
        """Finished optimizer steps."""
        self.accumulate, self.eval_batches = options.accumulate, options.eval_batches
        self.tokens = 0
        """Tokens trained on, over all ranks."""
        self.gathered_bytes = 0
        """Bytes that this rank has received from all-gathers of training."""
        self.seconds = 0.0
        """Seconds spent in training, without evaluation and checkpoints."""
        self.schedule: fxzero.Schedule | None = None
        """The schedule of a training step; None before the first one."""
        self.checkpoints: Path | None = None
        """Gets the checkpoints; None where none are written."""
        self._bound_s: float | None = None
        """Seconds below which no schedule gets, of a micro-step; None where that is not known."""

        def batches(tokens: torch.Tensor, seed: int, what: str) -> Batches:
            windows = Windows(tokens, options.seq, seed, text.bos_id)
            windows.require(options.batch * world.size, what)
            return Batches(windows, options.batch, text.vocab_size, subject.masked, world.rank, world.size)

        self.data = BatchStream(batches(text.train, options.seed, "training"))
        self.held_out = batches(text.held_out, 0, "held-out")

        torch.manual_seed(options.seed)
        model = subject.model
        self.num_params = sum(parameter.numel() for parameter in model.parameters())
        self.peak_lr = subject.default_lr if options.lr is None else options.lr
        self.warmup = options.steps // 4 if options.warmup is None else options.warmup
        groups = _groups(model, options.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=self.peak_lr, betas=(0.9, 0.98), fused=True)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=options.precision == "fp16")
        self.zero = fxzero.compile(
            model,
            optimizer=self.optimizer,
            device=world.device,
            init_fn=subject.initialize,
            mp_policy=_policy(options.precision),
            memory_budget=options.memory_budget,
            recompute=options.recompute,
        )

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer step over all ranks and micro-steps."""
        return self.options.batch * self.options.seq * self.accumulate * self.world.size

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def begin(self, checkpoint: Path | None) -> None:
        """Load the weights to begin with, or all of a checkpoint to go on from; a collective."""
        if checkpoint is None:
            self.subject.load(self.zero)
            return
        state = fxzero.load(checkpoint, self.zero, self.optimizer)
        self.data.load_state_dict(state["data"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]
        self.gathered_bytes = state["gathered_bytes"]
        if state["ranks"] != self.world.size:
            self._seed_dropout()
            self._keep_samples_of_a_step(state)

    def _keep_samples_of_a_step(self, state: Mapping[str, Any]) -> None:
        """At another number of ranks take as many samples in a step and an evaluation as before, if that is possible.

        Numbers of batches change; their size does not.
        """
        options, size = self.options, self.world.size
        is_as_before = (options.batch, options.accumulate) == (state["batch"], state["options_accumulate"])
        num_batches = state["accumulate"] * state["ranks"]
        if is_as_before and num_batches % size == 0:
            self.accumulate = num_batches // size
        if options.eval_batches == state["options_eval_batches"] and state["eval_batches"] * state["ranks"] % size == 0:
            self.eval_batches = state["eval_batches"] * state["ranks"] // size
        before, now = num_batches * state["batch"], options.batch * self.accumulate * size
        if before != now:
            self._say(
                f"a step has {now} sequences from now on, it had {before}: {state['ranks']} ranks trained before, and "
                f"{size} do now. --batch and --accumulate change it."
            )

    def _save(self) -> None:
        """Write a checkpoint, after which training goes on also where that is impossible; a collective."""
        if self.checkpoints is None:
            return
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "gathered_bytes": self.gathered_bytes,
            "data": self.data.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ranks": self.world.size,
            "batch": self.options.batch,
            "accumulate": self.accumulate,
            "options_accumulate": self.options.accumulate,
            "eval_batches": self.eval_batches,
            "options_eval_batches": self.options.eval_batches,
        }
        try:
            fxzero.save(self.checkpoints, self.zero, self.optimizer, extra=state, keep=self.options.keep)
        except (OSError, RankMismatchError) as error:
            self._say(f"no checkpoint was written after step {self.step}, training goes on: {error}")

    # -- steps -------------------------------------------------------------------------------------------------------

    def evaluate(self, stops: Callable[[], bool]) -> bool:
        """Log the loss on the held-out text over all ranks, with equal samples and masks each time.

        Args:
            stops: as in `train`.

        Returns:
            False if ranks were asked to stop; then nothing is logged.
        """
        loss_sum, num_predicted = 0.0, 0
        self.zero.eval()
        with torch.no_grad():
            for index in range(self.eval_batches):
                batch = self._on_device(self.held_out.batch_at(index))
                num = int((batch["labels"] != IGNORED).sum())
                loss_sum += float(self.zero(**batch).loss) * num
                num_predicted += num
                if stops():
                    return False
        self.zero.train()
        loss_sum, total = self.world.sum(loss_sum, num_predicted)
        self.metrics.add(HeldOutMetrics(self.step, loss_sum / total))
        return True

    def train(self, started: Callable[[], None] | None, stops: Callable[[], bool]) -> None:
        """Train to the last step, or until ranks are asked to stop; evaluate before, after and in between.

        Args:
            started: called after the first step.
            stops: called after each step and each batch of an evaluation; true on all ranks at once if they are to
                stop.

        Raises:
            CommandError: on every rank, if the loss is not finite any more.
        """
        options = self.options
        if not self.step:
            self.evaluate(stops)
            self._seed_dropout()
        losses: list[torch.Tensor] = []
        begin = time.perf_counter()
        is_quiet = not self.world.is_main
        with tqdm(total=options.steps, initial=self.step, unit="step", disable=is_quiet, dynamic_ncols=True) as bar:
            while self.step < options.steps:
                loss, grad_norm = self._train_step()
                losses.append(loss)
                if started is not None:
                    started()
                    started = None
                bar.update()
                stopped = stops()
                is_last = stopped or self.step == options.steps
                evaluates, saves = (bool(every) and self.step % every == 0 for every in self._every)
                if self.step % options.log_every and not (is_last or evaluates or saves):
                    continue
                (loss_sum,) = self.world.sum(float(torch.stack(losses).sum()))
                entry = self._log(loss_sum, len(losses), float(grad_norm), time.perf_counter() - begin)
                bar.set_postfix_str(self._live_line(entry, (time.perf_counter() - begin) / len(losses)))
                if not math.isfinite(loss_sum):
                    raise CommandError(f"The loss is {loss_sum} at step {self.step}. Lower --lr, or raise --warmup.")
                if saves or is_last:
                    self._save()
                if stopped:
                    return
                if evaluates and self.step < options.steps and not self.evaluate(stops):
                    if not saves:
                        self._save()
                    return
                losses, begin = [], time.perf_counter()
        self.evaluate(stops)

    @property
    def _every(self) -> tuple[int, int]:
        """Steps between evaluations, and between checkpoints."""
        return self.options.eval_every, self.options.save_every

    def _seed_dropout(self) -> None:
        key = (self.step,) if self.step else ()
        torch.manual_seed(generator_of("dropout", self.options.seed, self.world.rank, *key).initial_seed())

    def _train_step(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Take one optimizer step, without waiting for the device.

        Returns:
            The mean loss of the micro-steps of this rank, and the norm of the gradient over all ranks.
        """
        options = self.options
        lr = learning_rate(self.step, peak=self.peak_lr, warmup=self.warmup, steps=options.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss = self._accumulate_gradients()
        self.scaler.unscale_(self.optimizer)
        grad_norm = self.zero.clip_grad_norm_(options.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.step += 1
        return loss, grad_norm

    def _accumulate_gradients(self) -> torch.Tensor:
        """Run the micro-steps of an optimizer step, of which the last one reduces gradients; their mean loss."""
        loss_sum = torch.zeros((), device=self.world.device)
        for micro_step in range(self.accumulate):
            is_last = micro_step == self.accumulate - 1
            with nullcontext() if is_last else self.zero.no_sync():
                loss = self.zero(**self._on_device(next(self.data))).loss / self.accumulate
                self.scaler.scale(loss).backward()
            loss_sum += loss.detach()
        return loss_sum

    def _log(self, loss_sum: float, num_steps: int, grad_norm: float, seconds: float) -> StepMetrics:
        """Log the last `num_steps` steps, given the sum of their losses on all ranks."""
        if self.schedule is None:
            self.schedule = self.zero.schedule
            with suppress(FxzeroError):
                self._bound_s = self.schedule.timing.lower_bound_s
        self.seconds += seconds
        self.tokens += num_steps * self.tokens_per_step
        self.gathered_bytes += num_steps * self.accumulate * self.schedule.gathered_bytes_per_step
        entry = StepMetrics(
            step=self.step,
            loss=loss_sum / (num_steps * self.world.size),
            lr=self.optimizer.param_groups[0]["lr"],
            grad_norm=grad_norm,
            tokens=self.tokens,
            tokens_per_s=num_steps * self.tokens_per_step / seconds,
            gathered_bytes=self.gathered_bytes,
            elapsed=self.seconds,
        )
        self.metrics.add(entry)
        return entry

    def _live_line(self, entry: StepMetrics, step_s: float) -> str:
        """The loss and the speed: where the least seconds of a step are known, also how many times them it took."""
        parts = [f"loss {entry.loss:.3f}", f"{entry.tokens_per_s:.0f} tokens/s"]
        if self._bound_s:
            parts.append(f"{step_s / (self._bound_s * self.accumulate):.2f} x the bound")
        return ", ".join([*parts, f"{format_bytes(entry.gathered_bytes)} gathered"])

    def _on_device(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor.to(self.world.device, non_blocking=True) for name, tensor in batch.items()}


def _policy(precision: str) -> MixedPrecisionPolicy | None:
    """Compute in a narrow dtype; sums over ranks, losses, shards and the optimizer in fp32."""
    if precision == "fp32":
        return None
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, output_dtype=torch.float32)


def _groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups of the optimizer: weight decay for matrices and tables, none for biases and norms."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in trained if parameter.ndim >= 2]
    others = [parameter for parameter in trained if parameter.ndim < 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
