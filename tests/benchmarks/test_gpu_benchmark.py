"""The parts of the GPU's tables, at toy size on the CPU."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.__main__ import TABLES, Table, main, run
from benchmarks.gpu.measure import table
from benchmarks.gpu.report import markdown
from benchmarks.gpu.systems import Work, make


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_systems_take_the_same_steps_and_what_fails_or_comes_late_is_named() -> None:
    work, cpu = Work("gpt", 2, 8, is_toy=True), torch.device("cpu")
    rows = table(["eager:fp32", "fxzero:fp32", "none:fp32"], work, cpu, time.time() + 60, 1)
    assert rows[0]["loss"] == rows[1]["loss"]
    assert rows[0]["ms"] > 0
    assert "no system" in rows[2]["left_out"]
    assert table(["eager:fp32"], work, cpu, time.time() - 1, 1) == [{"system": "eager:fp32", "left_out": "no time"}]


def test_every_system_of_the_tables_has_a_known_name() -> None:
    known = {"eager", "compile", "compile_ro", "ddp", "fsdp2", "fsdp2compile", "fxzero", "stage2", "fused", "graph"}
    for each in TABLES:
        for name in each.systems:
            base, _, kind = name.partition(":")
            parts = {base} if base == "compile_ro" else set(base.split("_"))
            assert parts <= known
            assert kind in ("fp32", "bf16", "auto", "mp")
    with pytest.raises(ValueError, match="no system"):
        make("nothing:fp32", Work("llama", 1, 8, is_toy=True), torch.device("cpu"))


def test_a_table_compares_with_the_fastest_kind_of_peer() -> None:
    rows = [
        {"system": "eager:bf16", "ms": 8.0, "host_ms": 7.0, "first_s": 1.0},
        {"system": "compile:bf16", "ms": 4.0, "host_ms": 3.0, "first_s": 30.0},
        {"system": "fxzero:bf16", "ms": 5.0, "host_ms": 2.0, "first_s": 3.0, "peak_mib": 12},
        {"system": "fxzero:mp", "left_out": "no time"},
    ]
    text = markdown("Title", rows)
    assert "| fxzero:bf16  | 5" in text
    assert "1.25" in text
    assert "no time" in text


@pytest.mark.exhaustive
def test_the_command_runs_at_toy_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "gpu.json"
    sizes = ["--device", "cpu", "--toy", "--steps", "1", "--tables", "alone", "ranks", "llama"]
    with_files = ["--json", str(place), "--markdown", str(tmp_path / "gpu.md")]
    assert main([*sizes, *with_files, "--systems", "eager:fp32", "fxzero:bf16"]) == 0
    tables = json.loads(place.read_text())["tables"]
    assert {name: [set(row) >= {"ms", "loss"} for row in rows] for name, rows in tables.items()} == {
        name: [True, True] for name in ("alone", "ranks", "llama")
    }
    assert "Llama" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_two_ranks_of_nccl_train_alike_with_graphs_and_without() -> None:
    systems = ("fxzero:fp32", "fxzero_graph:fp32", "fsdp2:fp32")
    asked = Table("ranks", "", Work("gpt", 2, 16, is_toy=True), systems, 2)
    plain, graphed, peer = run(asked, "cuda", time.time() + 90, 2)
    assert plain["loss"] == graphed["loss"]
    assert plain["loss"] == pytest.approx(peer["loss"], rel=1e-3)
