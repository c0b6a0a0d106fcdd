"""The gradient bytes that a schedule says are copied, against what the profiler sees copied."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

import fxzero
from fxzero.models import GPT, GPT_PRESETS, LLAMA_PRESETS, ROBERTA_PRESETS, Llama, RobertaForMaskedLM
from fxzero.planner import plan
from fxzero.testing import engine_of, run_ranks
from tests.distributed import memory_workers
from tests.helpers.gradient_copies import copied_bytes

IN_PLACE = {
    "aten.add.out",
    "aten.addmm.out",
    "aten.bmm.out",
    "aten.index_add_.default",
    "aten.mm.out",
    "aten.sum.IntList_out",
    "aten.zero_.default",
}


class Normed(nn.Module):
    """A convolution and a norm, whose backwards have no form that writes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv1d(32, 8, 3), nn.LayerNorm(14), nn.Linear(14, 4)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = nn.functional.one_hot(input_ids % 32, 32).to(torch.float32).transpose(1, 2)
        return self.head(self.norm(self.conv(x))).square().mean() + 0 * labels.sum()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt": lambda: GPT(GPT_PRESETS["tiny"]),
    "gpt, untied": lambda: GPT(replace(GPT_PRESETS["tiny"], num_layers=1, tied=False)),
    "llama": lambda: Llama(replace(LLAMA_PRESETS["tiny"], num_layers=1)),
    "roberta": lambda: RobertaForMaskedLM(replace(ROBERTA_PRESETS["tiny"], num_layers=1, dropout=0.1)),
    "convolution": Normed,
}


@pytest.mark.parametrize("name", MODELS)
def test_copied_gradient_bytes_are_those_that_the_profiler_sees(name: str) -> None:
    torch.manual_seed(0)
    ids = torch.randint(2, 100, (2, 16))
    zero = fxzero.compile(MODELS[name]())

    def loss() -> torch.Tensor:
        output = zero(input_ids=ids, labels=ids)
        return output if isinstance(output, torch.Tensor) else output.loss

    loss().backward()  # binds what a backward writes to, and clears the padding
    zero.zero_grad()
    shards = engine_of(zero).sharded.shards
    assert shards is not None
    storages = {segment.untyped_storage().data_ptr() for segment in shards.grads.segments}
    measured, operators = copied_bytes(loss().backward, storages)
    assert measured == zero.schedule.totals.copied_grad_bytes
    assert {*operators} - {"aten.copy_.default"} <= IN_PLACE
    assert (measured > 0) == (name != "llama")


@pytest.mark.parametrize("name", ["gpt", "roberta"])
def test_copied_gradient_bytes_are_those_that_the_profiler_sees_on_two_ranks(name: str) -> None:
    for measured, planned in run_ranks(2, memory_workers.gradient_copies, name):
        assert measured == planned > 0


@pytest.mark.parametrize(
    "build",
    [
        lambda: GPT(replace(GPT_PRESETS["small"], num_layers=2)),
        lambda: GPT(replace(GPT_PRESETS["small"], num_layers=2, tied=False)),
        lambda: RobertaForMaskedLM(replace(ROBERTA_PRESETS["base"], num_layers=2)),
    ],
    ids=["gpt", "untied gpt", "roberta"],
)
def test_few_gradient_bytes_are_copied_in_models_of_real_width(build: Callable[[], nn.Module]) -> None:
    with torch.device("meta"):
        model = build()
        ids = torch.zeros(2, 16, dtype=torch.int64)
    totals = plan(model, {"input_ids": ids, "labels": ids}, world_size=2).totals
    assert 0 < totals.copied_grad_bytes <= 0.05 * sum(param.nbytes for param in model.parameters())


def test_what_an_operator_copies_inside_is_counted() -> None:
    x, weight, slot = torch.randn(6, 32), torch.randn(32), torch.empty(32)
    _, mean, rstd = torch.ops.aten.native_layer_norm(x, [32], weight, None, 1e-5)
    others = [torch.empty(6, 32), torch.empty(32)]

    def backward() -> None:
        args = (x, x, [32], mean, rstd, weight, weight, [True, True, True])
        torch.ops.aten.native_layer_norm_backward.out(*args, out0=others[0], out1=slot, out2=others[1])

    with torch.no_grad():
        measured, operators = copied_bytes(backward, {slot.untyped_storage().data_ptr()})
    assert operators == ["aten.native_layer_norm_backward.out"]
    assert measured >= slot.nbytes
