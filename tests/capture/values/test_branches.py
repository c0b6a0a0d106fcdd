import copy
import logging

import pytest
import torch
import transformers
from torch import Tensor, nn

import fxzero
from fxzero.testing import run_ranks


class Masked(nn.Module):
    """Takes another kernel where a mask hides nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, mask: Tensor, *, clears: bool = False) -> Tensor:
        h = self.inner(x)
        if clears:
            mask = mask.clone()
            mask[:, -1] = False
        if not bool((mask.sum() == mask.numel()) | (mask.cumsum(-1)[:, -1] == 4).all()):
            h = h.masked_fill(~mask[..., None], 0.0) * 3
        return self.outer(h)


def _masks() -> list[Tensor]:
    ones, padded = torch.ones(2, 4, dtype=torch.bool), torch.ones(2, 4, dtype=torch.bool)
    padded[1, 2:] = False
    return [ones, padded, ones, ~padded, padded, ones]


def test_a_branch_on_a_mask_is_taken_as_in_eager(caplog: pytest.LogCaptureFixture) -> None:
    plain = Masked()
    zero = fxzero.compile(copy.deepcopy(plain), islands=())
    with caplog.at_level(logging.INFO, logger="fxzero"):
        for clears in (False, True):
            for step, mask in enumerate(_masks()):
                x = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(step))
                for model in (plain, zero):
                    model.zero_grad()
                expected, got = plain(x, mask), None
                if clears:  # values that are written in place are not followed
                    with pytest.raises(fxzero.errors.CaptureError):
                        zero(x, mask, clears=True)
                    return
                got = zero(x, mask)
                expected.sum().backward()
                got.sum().backward()
                assert torch.equal(got, expected)
                shards = [param.grad for param in zero.parameters()]
                for param, shard in zip(plain.parameters(), shards, strict=True):
                    assert param.grad is not None and shard is not None
                    assert torch.equal(param.grad.flatten(), shard.flatten())
            assert sum("traced and planned" in record.message for record in caplog.records) == 2


def _grouped_queries() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def _train(model: nn.Module) -> list[float]:
    """Losses over masks of ones and others."""
    losses = list[float]()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for step in range(3):
        ids = torch.randint(32, (2, 8), generator=torch.Generator().manual_seed(step))
        mask = torch.ones(2, 8, dtype=torch.long)
        mask[1, 8 - step % 2 * 3 :] = 0
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, attention_mask=mask, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_masks_of_ones_keep_the_kernel_of_eager() -> None:
    assert _train(fxzero.compile(_grouped_queries())) == _train(_grouped_queries())


def _masks_on_ranks(rank: int, world_size: int) -> list[Tensor]:
    """Outputs over masks that hide something on one rank alone, on each in turn."""
    torch.manual_seed(0)
    zero = fxzero.compile(Masked(), islands=())
    ones, padded, *_ = _masks()
    outputs = list[Tensor]()
    for step in range(3):
        output = zero(torch.ones(2, 4, 8), padded if step == rank else ones)
        output.sum().backward()
        outputs.append(output.detach())
    return outputs


def test_ranks_may_have_other_masks() -> None:
    torch.manual_seed(0)
    plain = Masked()
    ones, padded, *_ = _masks()
    for rank, outputs in enumerate(run_ranks(2, _masks_on_ranks)):
        for step, output in enumerate(outputs):
            assert torch.equal(output, plain(torch.ones(2, 4, 8), padded if step == rank else ones))
