"""Weights of ranks as plain files: a checkpoint that is exported, `save_pretrained`, and what is trained alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

import fxzero
from fxzero.__main__ import main
from fxzero.errors import CheckpointError
from fxzero.testing import run_ranks
from tests.distributed import export_workers


def assert_loads(folder: Path, wanted: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> None:
    """Plain transformers finds every weight in a folder."""
    loaded: Any = LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
    model, info = loaded
    assert not any(info.values()), info
    found = model.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name].to(dtype)) for name in wanted)


def test_weights_leave_as_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = run_ranks(2, export_workers.save_all, tmp_path)[0]
    one, many, run = tmp_path / "one", tmp_path / "many", tmp_path / "run"
    assert sorted(path.name for path in one.iterdir()) == ["config.json", "generation_config.json", "model.safetensors"]
    assert_loads(one, wanted)
    sizes = {path.name: path.stat().st_size for path in many.glob("model*.safetensors")}
    assert len(sizes) > 1
    assert [name for name, size in sizes.items() if size > 22_000] == []
    index = json.loads((many / "model.safetensors.index.json").read_text())
    assert {*index["weight_map"].values()} == sizes.keys()
    assert_loads(many, wanted)

    file = tmp_path / "new" / "weights.safetensors"
    assert main(["export", str(run), str(file)]) == 0
    stored = load_file(file)
    assert stored.keys() == wanted.keys() - {"lm_head.weight"}
    assert all(torch.equal(value, wanted[name]) for name, value in stored.items())
    fxzero.export(run / "000001", many, config=one)
    assert_loads(many, wanted)
    assert sorted(path.name for path in many.iterdir()) == sorted(path.name for path in one.iterdir())
    options = ["--max-shard-size", "20KB", "--config", str(one), "--dtype", "bfloat16"]
    assert main(["export", str(run), str(many), *options]) == 0
    assert_loads(many, wanted, torch.bfloat16)

    damaged = run / "000001" / "rank_00001.bin"
    data = damaged.read_bytes()
    damaged.write_bytes(data[:1] + bytes([data[1] ^ 4]) + data[2:])
    before = file.read_bytes()
    assert main(["export", str(run), str(file)]) == 2
    assert main(["export", str(tmp_path / "none"), str(file)]) == 2
    assert main(["export", str(run), str(file), "--max-shard-size", "big"]) == 2
    printed = capsys.readouterr().err
    assert "rank_00001.bin is damaged" in printed
    assert "There is no checkpoint in" in printed
    assert "max_shard_size is 'big'" in printed
    assert (file.read_bytes(), [*file.parent.iterdir()]) == (before, [file])
    with pytest.raises(CheckpointError, match="has no config.json"):
        fxzero.export(run, many, config=run)


def test_adapters_of_peft_are_not_exported_under_their_names(tmp_path: Path) -> None:
    layer = torch.nn.ModuleDict({"base_layer": torch.nn.Linear(2, 2)})
    fxzero.save(tmp_path / "run", fxzero.compile(torch.nn.ModuleDict({"body": layer})))
    with pytest.raises(CheckpointError, match=r"adapters of peft \(body.base_layer.weight\).* zero.save_pretrained"):
        fxzero.export(tmp_path / "run", tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_what_is_trained_leaves_alone(tmp_path: Path) -> None:
    run_ranks(2, export_workers.parts_of_states, tmp_path)
    assert load_file(tmp_path / "plain.safetensors")
