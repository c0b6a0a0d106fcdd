"""Files of another kind, damaged in a way that leaves them readable, are refused by name."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fxzero
from fxzero.checkpoint.files import CHECKPOINTS, read_json
from fxzero.errors import CheckpointError


def test_an_index_is_no_manifest(tmp_path: Path) -> None:
    zero = fxzero.compile(nn.Linear(2, 3))
    saved = fxzero.save(tmp_path, zero)
    (saved / "manifest.json").write_bytes((saved / "rank_00000.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"000001/manifest.json is no manifest"):
        fxzero.load(tmp_path, zero)
    (saved / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"000001/manifest.json is missing: .* Remove .*000001 to go on"):
        fxzero.load(tmp_path, zero)
    assert fxzero.save(tmp_path, zero).name == "000002"


def test_a_checksum_of_nothing_is_not_enough(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(b'{"format": "fxzero checkpoint", "version": 1, "crc32": 0}\n')
    with pytest.raises(CheckpointError, match=r"manifest.json is damaged: its content is no JSON"):
        read_json(tmp_path / "manifest.json")


def test_blocks_are_read_in_threads(tmp_path: Path) -> None:
    model = nn.Linear(1100, 1000)  # more than a block
    zero = fxzero.compile(model)
    before = {name: tensor.clone() for name, tensor in zero.state_dict().items()}
    saved = fxzero.save(tmp_path / CHECKPOINTS, zero)
    with torch.no_grad():
        for param in zero.parameters():
            param.zero_()
    with torch.inference_mode():
        fxzero.load(tmp_path, zero)  # the folder of a run
    torch.testing.assert_close(zero.state_dict(), before, rtol=0, atol=0)
    data = bytearray((saved / "rank_00000.bin").read_bytes())
    data[1000 * 1100 * 4 - 4] ^= 1
    (saved / "rank_00000.bin").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"rank_00000.bin is damaged: bytes of model/weight have changed"):
        fxzero.load(tmp_path, zero)
    torch.testing.assert_close(zero.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "was", "became"),
    [
        ("model.safetensors.index.json", b'"weight_map"', b'"veight_map"'),
        ("model.safetensors", b'"data_offsets":[0,24]', b'"data_offsets":[    ]'),
    ],
)
def test_damaged_headers_are_refused(tmp_path: Path, name: str, was: bytes, became: bytes) -> None:
    zero = fxzero.compile(nn.Linear(2, 3, bias=False))
    save_file({"weight": torch.ones(3, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"weight": "model.safetensors"}}')
    data = (tmp_path / name).read_bytes()
    assert was in data
    (tmp_path / name).write_bytes(data.replace(was, became))
    with pytest.raises(CheckpointError, match=f"{name} is truncated, or no"):
        fxzero.load_pretrained(zero, tmp_path)
