"""What `fxzero train` writes: weights, metrics, picture, schedule; and how it refuses."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from fxzero import models
from fxzero.checkpoint.safetensors import save_stream, tied_names
from fxzero.commands.errors import CommandError
from fxzero.train.models import config_of
from fxzero.train.options import TrainOptions, learning_rate
from fxzero.train.report import HeldOutMetrics, Metrics, StepMetrics, draw_loss, format_summary, shorten, smoothed

TENSORS = {
    "b.weight": torch.randn(5, 7),
    "a.weight": torch.randn(3, 2, dtype=torch.bfloat16),
    "scalar": torch.tensor(2.5),
    "nothing": torch.empty(0, 4),
    "ids": torch.arange(6).reshape(2, 3).t(),
    "flags": torch.tensor([True, False, True]),
}
SPECS = {name: tensor.to("meta") for name, tensor in TENSORS.items()}


def test_streamed_file_equals_that_of_the_library(tmp_path: Path) -> None:
    save_stream(tmp_path / "ours", SPECS, reversed(TENSORS.items()), {"format": "pt", "note": "text"})
    loaded = load_file(tmp_path / "ours")
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    with safe_open(tmp_path / "ours", "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "text"}
    one_note = {"format": "pt"}
    save_stream(tmp_path / "ours", SPECS, TENSORS.items(), one_note)
    save_file({name: tensor.contiguous() for name, tensor in TENSORS.items()}, tmp_path / "theirs", one_note)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_file_with_tensors_missing_does_not_appear(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 tensors were announced and did not come"):
        save_stream(tmp_path / "file", SPECS, list(TENSORS.items())[2:], {})
    with pytest.raises(ValueError, match=r"other .* is not among the tensors announced"):
        save_stream(tmp_path / "file", SPECS, [("other", torch.ones(2))], {})
    assert not (tmp_path / "file").exists()


def test_tied_names_are_found_on_meta() -> None:
    with torch.device("meta"):
        model = models.RobertaForMaskedLM(models.ROBERTA_PRESETS["tiny"])
    assert tied_names(model) == {"lm_head.weight": "embeddings.word.weight"}
    assert tied_names(nn.Linear(2, 2)) == {}


def test_learning_rate_rises_and_falls() -> None:
    rates = [learning_rate(step, peak=1.0, warmup=10, steps=110) for step in range(110)]
    assert rates[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert rates[10] == 1.0
    assert rates[60] == pytest.approx(0.5)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 0.001
    assert learning_rate(0, peak=1.0, warmup=0, steps=1) == 1.0


def _metrics() -> Metrics:
    metrics = Metrics()
    metrics.add(HeldOutMetrics(0, 6.0))
    for step in range(10, 60, 10):
        metrics.add(StepMetrics(step, 6.0 - step / 20, 1e-3, 1.0, 100 * step, 1000.0, 2048 * step, step / 10))
    metrics.add(HeldOutMetrics(50, 3.5))
    return metrics


def test_metrics_are_one_json_object_a_line(tmp_path: Path) -> None:
    with (tmp_path / "metrics.jsonl").open("w") as file:
        metrics = Metrics(file)
        for entry in (*_metrics().held_out, *_metrics().steps):
            metrics.add(entry)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[0] == {"step": 0, "held_out_loss": 6.0}
    wanted = {"step", "loss", "lr", "grad_norm", "tokens", "tokens_per_s", "gathered_bytes", "elapsed"}
    assert all(line.keys() == wanted for line in lines[2:])


def test_picture_is_a_png(tmp_path: Path) -> None:
    draw_loss(_metrics(), "a title", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_smoothing_starts_at_the_first_value() -> None:
    assert smoothed([2.0, 2.0, 2.0]) == pytest.approx([2.0, 2.0, 2.0])
    assert smoothed([]) == []


def test_summary_says_losses_memory_and_files(tmp_path: Path) -> None:
    (tmp_path / "schedule.txt").write_text("")
    peaks = [{"host": 512 << 20}, {"host": 256 << 20, "gpu": 1 << 30}]
    text = format_summary(_metrics(), peaks, "all_gather  w", tmp_path)
    assert "all_gather  w" in text
    assert "held-out loss    6.000 at the start, 3.500 at the end" in text
    assert "rank 1: 256 MiB host, 1 GiB gpu" in text
    assert "50 steps, 5000 tokens in 5 s (1000 tokens/s), 100 KiB gathered per rank" in text


def test_a_long_schedule_is_shortened_in_the_middle() -> None:
    text = "\n".join(f"line {index}" for index in range(100))
    short = shorten(text, Path("schedule.txt")).splitlines()
    assert (short[0], short[20], short[-1]) == ("line 0", "... 60 more lines, all in schedule.txt ...", "line 99")
    assert shorten("few\nlines", Path("schedule.txt")) == "few\nlines"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (TrainOptions(model="bert"), "--model bert is not known; choose one of: roberta, gpt, llama."),
        (TrainOptions(steps=0), "--steps 0 must be at least 1."),
        (TrainOptions(vocab_size=10), "--vocab-size 10 must be at least 261."),
        (TrainOptions(lr=float("nan")), "--lr nan must be a finite number above 0."),
        (TrainOptions(nproc=0), "--nproc 0 must be at least 1."),
    ],
)
def test_options_without_meaning_are_refused(options: TrainOptions, message: str) -> None:
    with pytest.raises(CommandError) as error:
        options.validate()
    assert str(error.value) == message


def test_presets_and_lengths_that_a_model_has_not_are_refused() -> None:
    with pytest.raises(
        CommandError, match="--preset nano is not known for gpt; choose one of: micro, tiny, mini, small"
    ):
        config_of("gpt", "nano", 16)
    with pytest.raises(CommandError, match="--seq 129 is more than roberta mini has positions for; at most 128"):
        config_of("roberta", "mini", 129)


def test_files_that_are_not_there_or_there_already_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match=r"--data .*nothing does not exist"):
        TrainOptions(data=tmp_path / "nothing").check_files()
    (tmp_path / "results").write_text("")
    with pytest.raises(CommandError, match=r"--out .* exists already and is not empty"):
        TrainOptions(out=tmp_path).check_files()
    TrainOptions(data=tmp_path / "results", out=tmp_path / "new").check_files()
