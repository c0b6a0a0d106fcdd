"""Folders of Hugging Face into shards of models on the meta device."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxzero
from fxzero.errors import CheckpointError, RankMismatchError

SMALL = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32, "vocab_size": 64}


def masked_model(device: str = "meta") -> nn.Module:
    import transformers

    with torch.device(device):
        return transformers.RobertaForMaskedLM(transformers.RobertaConfig(**SMALL))


def load(rank: int, world_size: int, folder: Path) -> dict[str, Tensor]:
    zero = fxzero.compile(masked_model(), device="cpu")
    assert not any(fxzero.load_pretrained(zero, folder))
    return zero.state_dict()


def load_into_another_head(rank: int, world_size: int, folder: Path) -> dict[str, Tensor]:
    import transformers

    with torch.device("meta"):
        model = transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**SMALL))
    zero = fxzero.compile(model, device="cpu")
    with pytest.raises(CheckpointError, match=r"missing \['classifier.dense.weight'.*unexpected \['lm_head.bias'"):
        fxzero.load_pretrained(zero, folder)
    result: Any = fxzero.load_pretrained(zero, folder, strict=False)
    assert "classifier.dense.weight" in result.missing_keys
    return zero.state_dict()


def truncated(rank: int, world_size: int, folder: Path) -> None:
    """The file is named, on rank 1 alone too."""
    path = sorted(folder.glob("*.safetensors"))[rank]
    if rank == 1:
        path.write_bytes(path.read_bytes()[:-8])
    torch.distributed.barrier()
    zero = fxzero.compile(masked_model(), device="cpu")
    with pytest.raises((CheckpointError, RankMismatchError), match=r"-of-.*safetensors is truncated, or no"):
        fxzero.load_pretrained(zero, folder)


class Normed(nn.Module):
    """Parameters, and buffers of both kinds."""

    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(8, 12), nn.BatchNorm1d(12), nn.Linear(12, 3)
        self.register_buffer("shift", torch.randn(8), persistent=False)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.shift)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x + self.shift))).square().mean()


def real_on_one_rank(rank: int, world_size: int, real: int) -> dict[str, Tensor]:
    """A model that has values on one rank, and is on meta on the others, trains as one that has them on all."""
    torch.manual_seed(3)
    plain = Normed()
    states: list[dict[str, Tensor]] = []
    for is_real in (True, rank == real):
        torch.manual_seed(3)
        with torch.device("cpu" if is_real else "meta"):
            model = Normed()
        if is_real:
            model.load_state_dict(plain.state_dict())
            model.shift = plain.shift.clone()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(rank))
        zero = fxzero.compile(model, optimizer=optimizer, device="cpu", example=x)
        zero(x).backward()
        optimizer.step()
        states.append(zero.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    return states[1]


def real_on_rank_1_alone(rank: int, world_size: int) -> None:
    with pytest.raises(CheckpointError, match=r"first.bias is on the meta device on rank 0, and has values on rank 1"):
        real_on_one_rank(rank, world_size, 1)
