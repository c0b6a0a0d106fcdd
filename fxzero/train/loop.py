"""The training loop: an ordinary one of PyTorch, except for the line that compiles the model."""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from tqdm import tqdm

import fxzero
from fxzero.checkpoint.safetensors import tied_names
from fxzero.commands.errors import CommandError
from fxzero.commands.world import World
from fxzero.graph.names import format_bytes
from fxzero.train.batches import IGNORED, Batches, Windows, generator_of
from fxzero.train.models import ARCHITECTURES, build, config_of, default_lr, initializer
from fxzero.train.options import TrainOptions, learning_rate
from fxzero.train.report import HeldOutMetrics, Metrics, StepMetrics
from fxzero.train.text import Text


class Trainer:
    """The model, its optimizer and its data on one rank."""

    def __init__(self, options: TrainOptions, world: World, text: Text, metrics: Metrics) -> None:
        """Build everything; nothing is traced or allocated before the first step.

        Raises:
            CommandError: the text is too short for the options.
        """
        self.options = options
        self.world = world
        self.metrics = metrics
        self.step = 0
        """Finished optimizer steps."""
        self.seconds = 0.0
        """Seconds spent in training, without evaluation."""
        self.schedule: fxzero.Schedule | None = None
        """The schedule of a training step; None before the first one."""

        architecture = ARCHITECTURES[options.model]
        self.config = dataclasses.replace(
            config_of(options.model, options.preset, options.seq), vocab_size=text.vocab_size
        )

        def batches(tokens: torch.Tensor, seed: int, what: str) -> Batches:
            windows = Windows(tokens, options.seq, seed)
            windows.require(options.batch * world.size, what)
            return Batches(windows, options.batch, text.vocab_size, architecture.masked, world.rank, world.size)

        self.data = batches(text.train, options.seed, "training")
        self.held_out = batches(text.held_out, 0, "held-out")

        torch.manual_seed(options.seed)
        self.model = build(options.model, self.config)
        self.tied = tied_names(self.model)
        state = self.model.state_dict().items()
        self.stored = {name: tensor.to("meta") for name, tensor in state if name not in self.tied}
        """The tensors of a file of the weights, on the meta device; tied ones once."""
        self.tokens_per_step = options.batch * options.seq * options.accumulate * world.size
        """Tokens over all ranks and micro-steps."""
        self.num_params = sum(parameter.numel() for parameter in self.model.parameters())
        self.peak_lr = default_lr(self.config) if options.lr is None else options.lr
        self.warmup = options.steps // 4 if options.warmup is None else options.warmup
        groups = _groups(self.model, options.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=self.peak_lr, betas=(0.9, 0.98), fused=True)
        self.zero = fxzero.compile(
            self.model, optimizer=self.optimizer, device=world.device, init_fn=initializer(text.vocab_size)
        )

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
            for index in range(self.options.eval_batches):
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

    def train(self, started: Callable[[], None], stops: Callable[[], bool]) -> None:
        """Train to the last step, or until ranks are asked to stop; evaluate before, after and in between.

        Args:
            started: called after the first step.
            stops: called after each step and each batch of an evaluation; true on all ranks at once if they are to
                stop.

        Raises:
            CommandError: on every rank, if the loss is not finite any more.
        """
        options = self.options
        self.evaluate(stops)
        torch.manual_seed(generator_of("dropout", options.seed, self.world.rank).initial_seed())
        losses: list[torch.Tensor] = []
        begin = time.perf_counter()
        with tqdm(total=options.steps, unit="step", disable=not self.world.is_main, dynamic_ncols=True) as bar:
            while self.step < options.steps:
                loss, grad_norm = self._train_step()
                losses.append(loss)
                if self.step == 1:
                    started()
                bar.update()
                stopped = stops()
                evaluates = options.eval_every and self.step % options.eval_every == 0
                if self.step % options.log_every and self.step < options.steps and not (evaluates or stopped):
                    continue
                (loss_sum,) = self.world.sum(float(torch.stack(losses).sum()))
                entry = self._log(loss_sum, len(losses), float(grad_norm), time.perf_counter() - begin)
                gathered = format_bytes(entry.gathered_bytes)
                bar.set_postfix_str(f"loss {entry.loss:.3f}, {entry.tokens_per_s:.0f} tokens/s, {gathered} gathered")
                if not math.isfinite(loss_sum):
                    raise CommandError(f"The loss is {loss_sum} at step {self.step}. Lower --lr, or raise --warmup.")
                if stopped:
                    return
                if evaluates and self.step < options.steps and not self.evaluate(stops):
                    return
                losses, begin = [], time.perf_counter()
        self.evaluate(stops)

    def _train_step(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Take one optimizer step, without waiting for the device.

        Returns:
            The mean loss of the micro-steps of this rank, and the norm of the gradient over all ranks.
        """
        options = self.options
        lr = learning_rate(self.step, peak=self.peak_lr, warmup=self.warmup, steps=options.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss_sum = torch.zeros((), device=self.world.device)
        for micro_step in range(options.accumulate):
            batch = self._on_device(self.data.batch_at(self.step * options.accumulate + micro_step))
            loss = self.zero(**batch).loss / options.accumulate
            loss.backward()
            loss_sum += loss.detach()
        grad_norm = self.zero.clip_grad_norm_(options.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return loss_sum, grad_norm

    def _log(self, loss_sum: float, num_steps: int, grad_norm: float, seconds: float) -> StepMetrics:
        """Log the last `num_steps` steps, given the sum of their losses on all ranks."""
        if self.schedule is None:
            self.schedule = self.zero.schedule
        self.seconds += seconds
        entry = StepMetrics(
            step=self.step,
            loss=loss_sum / (num_steps * self.world.size),
            lr=self.optimizer.param_groups[0]["lr"],
            grad_norm=grad_norm,
            tokens=self.step * self.tokens_per_step,
            tokens_per_s=num_steps * self.tokens_per_step / seconds,
            gathered_bytes=self.step * self.options.accumulate * self.schedule.gathered_bytes_per_step,
            elapsed=self.seconds,
        )
        self.metrics.add(entry)
        return entry

    def _on_device(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor.to(self.world.device, non_blocking=True) for name, tensor in batch.items()}


def _groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups of the optimizer: weight decay for matrices and tables, none for biases and norms."""
    decayed = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
