"""fxzero.load_pretrained: several files, other heads, damaged files."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fxzero.testing import run_ranks
from tests.distributed import pretrained_workers as workers

pytest.importorskip("transformers")


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model: Any = workers.masked_model("cpu")
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    return tmp_path, model.state_dict()


def test_several_files_fill_a_model_on_meta(saved: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, wanted = saved
    for state in run_ranks(2, workers.load, folder):
        assert state.keys() == wanted.keys()
        assert all(torch.equal(state[name], value) for name, value in wanted.items())


def test_another_head_is_initialised(saved: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, wanted = saved
    first, second = run_ranks(2, workers.load_into_another_head, folder)
    for name, value in first.items():
        assert torch.equal(value, second[name])
        assert torch.equal(value, wanted.get(name, value)), name
    assert first["classifier.dense.weight"].std() > 0


def test_a_truncated_file_is_named(saved: tuple[Path, dict[str, torch.Tensor]]) -> None:
    run_ranks(2, workers.truncated, saved[0])


def test_values_of_rank_0_reach_ranks_that_have_none() -> None:
    run_ranks(2, workers.real_on_one_rank, 0)
    run_ranks(2, workers.real_on_rank_1_alone)
