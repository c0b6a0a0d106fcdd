"""Models whose repeated blocks are traced once have the graph of a trace of the whole model, node by node."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fxzero.capture import Captured, capture
from fxzero.graph.sharding import Sharding
from fxzero.models import GPT, GPT_PRESETS, LLAMA_PRESETS, MLP, ROBERTA_PRESETS, Llama, MLPConfig, RobertaForMaskedLM
from tests.helpers.captured import param_specs
from tests.helpers.same_graph import described

IDS = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(0))


def _capture(model: nn.Module, call: dict[str, Any], *, stamps: bool, with_backward: bool = True) -> Captured:
    return capture(
        model, model.forward, (), call, param_specs(model), device=torch.device("cpu"), sharding=Sharding.over(2),
        with_backward=with_backward, stamps=stamps,
    )  # fmt: skip


def _check(model: nn.Module, caplog: Any, *, with_backward: bool = True, **call: Any) -> tuple[Captured, list[str]]:
    """The captured step, which is that of a whole trace, and what was logged of its blocks."""
    caplog.set_level(logging.INFO, "fxzero.capture.repeats")
    caplog.clear()
    found = _capture(model, call, stamps=True, with_backward=with_backward)
    whole = _capture(model, call, stamps=False, with_backward=with_backward)
    assert described(found) == described(whole)
    assert (found.output, found.differentiable, found.differentiated) == (
        whole.output, whole.differentiable, whole.differentiated,
    )  # fmt: skip
    assert found.state.guards.values.keys() == whole.state.guards.values.keys()
    return found, [record.getMessage() for record in caplog.records]


def _presets(num_layers: int) -> dict[str, tuple[nn.Module, dict[str, Any]]]:
    ids: dict[str, Any] = {"input_ids": IDS, "labels": IDS}
    return {
        "gpt": (GPT(replace(GPT_PRESETS["tiny"], num_layers=num_layers)), ids),
        "llama": (Llama(replace(LLAMA_PRESETS["tiny"], num_layers=num_layers)), ids),
        "roberta": (RobertaForMaskedLM(replace(ROBERTA_PRESETS["tiny"], num_layers=num_layers)), ids),
        "mlp": (MLP(MLPConfig(num_layers=num_layers, dropout=0.1)), {"x": torch.ones(4, 16)}),
    }


@pytest.mark.parametrize(
    "family",
    [
        "gpt",
        "llama",
        pytest.param("roberta", marks=pytest.mark.exhaustive),
        pytest.param("mlp", marks=pytest.mark.exhaustive),
    ],
)
def test_graph_is_that_of_a_whole_trace_for_our_models(family: str, caplog: Any) -> None:
    model, call = _presets(8)[family]
    _, log = _check(model, caplog, **call)
    assert "are stamped from" in log[0]


def _transformer(family: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 64}
    by_layers = {**sizes, "num_hidden_layers": 7}
    grouped = {**by_layers, "num_key_value_heads": 1}
    makers: dict[str, Callable[[], nn.Module]] = {
        "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**grouped)),
        "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(sliding_window=4, **grouped)),
        "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**by_layers)),
        "gpt2": lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_embd=16, n_layer=7, n_head=2, vocab_size=64, bos_token_id=1, eos_token_id=2)
        ),
        "t5": lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                d_model=16, d_kv=8, d_ff=16, num_layers=8, num_decoder_layers=1, num_heads=2, vocab_size=64,
                decoder_start_token_id=0,
            )
        ),
    }  # fmt: skip
    return makers[family]().train()


@pytest.mark.parametrize(
    "family",
    ["llama", "bert", *(pytest.param(each, marks=pytest.mark.exhaustive) for each in ("gpt2", "mistral", "t5"))],
)
@pytest.mark.filterwarnings("ignore")
def test_graph_is_that_of_a_whole_trace_for_hugging_face(family: str, caplog: Any) -> None:
    model = _transformer(family)
    if family in ("mistral", "gpt2"):  # whose first forward ever leaves something behind, or warns
        _capture(model, {"input_ids": IDS, "labels": IDS}, stamps=False)
    _, log = _check(model, caplog, input_ids=IDS, labels=IDS)
    assert "are stamped from" in log[0]


@pytest.mark.filterwarnings("ignore")
def test_a_mask_on_whose_values_forward_branches_is_no_reason_to_trace_all_blocks(caplog: Any) -> None:
    mask = torch.ones_like(IDS)
    mask[0, 4:] = 0
    found, log = _check(_transformer("llama"), caplog, input_ids=IDS, labels=IDS, attention_mask=mask)
    assert "are stamped from" in log[0]
    assert found.fits([IDS, IDS, mask])
    assert not found.fits([IDS, IDS, torch.ones_like(IDS)])


class Block(nn.Module):
    """A block whose forward can differ in many ways."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)
        self.drop = nn.Dropout(0.1)
        self.scale, self.act = 1.0, torch.tanh
        self.without_grad = self.detached = self.checkpointed = False
        self.constant: float | None = None

    def inner(self, x: Tensor) -> Tensor:
        y = self.drop(self.act(self.linear(self.norm(x)))) * self.scale
        return y if self.constant is None else y * torch.tensor(self.constant)

    def forward(self, x: Tensor) -> Tensor:
        if self.without_grad:
            with torch.no_grad():
                return x + self.inner(x)
        if self.checkpointed:
            return x + checkpoint(self.inner, x, use_reentrant=False)
        return x + self.inner(x.detach() if self.detached else x)


class Stack(nn.Module):
    """Blocks one after another."""

    def __init__(self, num_blocks: int = 9) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(num_blocks))
        self.skip_from: int | None = None
        self.order = list(range(num_blocks))
        self.collects = self.sums = self.ties = False

    def forward(self, x: Tensor) -> Any:
        x = self.first(x)
        seen: list[Tensor] = []
        for index in self.order:
            x = self.blocks[index](x)
            seen.append(x)
            if self.sums and index == 4:
                x = x * 2
        if self.skip_from is not None:
            x = x + seen[self.skip_from]
        if self.ties:
            x = F.linear(x, self.blocks[4].linear.weight)
        loss = x.square().mean()
        return (loss, *seen) if self.collects else (loss,)


X = torch.ones(2, 4)


def test_graph_is_that_of_a_whole_trace_for_a_stack(caplog: Any) -> None:
    found, log = _check(Stack(), caplog, x=X)
    assert log == ["blocks.2 to blocks.6 (5 blocks) are stamped from blocks.1"]
    assert [*found.step.grads] == [name for name, _ in Stack().named_parameters()]


def test_graph_is_that_of_a_whole_trace_without_backward(caplog: Any) -> None:
    _, log = _check(Stack(), caplog, with_backward=False, x=X)
    assert "are stamped from" in log[0]


def test_graph_is_that_of_a_whole_trace_under_autocast(caplog: Any) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        _, log = _check(Stack(), caplog, x=X)
    assert "are stamped from" in log[0]


def test_graph_is_that_of_a_whole_trace_for_blocks_of_two_kinds(caplog: Any) -> None:
    model = Stack(14)
    for block in list(model.blocks)[::2]:
        block.act = torch.relu
    _, log = _check(model, caplog, x=X)
    assert log == ["blocks.3 to blocks.8 (6 blocks) are stamped from blocks.1"]


def test_constants_of_blocks_are_their_own(caplog: Any) -> None:
    model = Stack()
    for block in model.blocks:
        block.constant = 0.5
    _, log = _check(model, caplog, x=X)
    assert "are stamped from" in log[0]


def _other(change: Callable[[Any], None]) -> Callable[[Stack], None]:
    return lambda model: change(model.blocks[4])


def _hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 2


OTHER: dict[str, Callable[[Stack], Any]] = {
    "activation": _other(lambda block: setattr(block, "act", torch.relu)),
    "scale": _other(lambda block: setattr(block, "scale", 0.5)),
    "constant": lambda model: [setattr(block, "constant", 1.0 + at) for at, block in enumerate(model.blocks)],
    "frozen": _other(lambda block: block.linear.weight.requires_grad_(False)),
    "eval": _other(lambda block: block.eval()),
    "no grad": _other(lambda block: setattr(block, "without_grad", True)),
    "detached": _other(lambda block: setattr(block, "detached", True)),
    "checkpoint": _other(lambda block: setattr(block, "checkpointed", True)),
    "all checkpointed": lambda model: [setattr(block, "checkpointed", True) for block in model.blocks],
    "dtype": _other(lambda block: block.norm.double()),
    "hook": _other(lambda block: block.register_forward_hook(_hook)),
    "hook of backward": _other(lambda block: block.register_full_backward_hook(lambda *args: None)),
    "run twice": lambda model: model.order.append(4),
    "left out": lambda model: model.order.remove(4),
    "skip": lambda model: setattr(model, "skip_from", 4),
    "collected": lambda model: setattr(model, "collects", True),
    "between": lambda model: setattr(model, "sums", True),
    "tied to the head": lambda model: setattr(model, "ties", True),
    "tied to each other": lambda model: setattr(model.blocks[6].linear, "weight", model.blocks[4].linear.weight),
    "all tied": lambda model: [setattr(b.linear, "weight", model.blocks[0].linear.weight) for b in model.blocks],
    "parametrized": _other(lambda block: nn.utils.parametrizations.weight_norm(block.linear)),
}  # fmt: skip


@pytest.mark.parametrize("what", OTHER)
def test_graph_is_that_of_a_whole_trace_if_a_block_differs(what: str, caplog: Any) -> None:
    model = Stack()
    OTHER[what](model)
    if what == "dtype":
        model.blocks[4].norm.float()
    _check(model, caplog, x=X)


@pytest.mark.parametrize(
    "change",
    [
        lambda block: setattr(block, "scale", 0.5),
        lambda block: setattr(block.norm, "eps", 1e-3),
        lambda block: setattr(block, "act", torch.relu),
        lambda block: setattr(block.drop, "p", 0.2),
        lambda block: block.register_forward_hook(_hook),
    ],
)
def test_guards_see_changes_of_blocks_that_were_not_traced(change: Callable[[Any], Any], caplog: Any) -> None:
    model = Stack()
    found, log = _check(model, caplog, x=X)
    assert "blocks.2 to blocks.6" in log[0]
    assert found.state.holds()
    change(model.blocks[4])
    assert not found.state.holds()


class Ladder(nn.Module):
    """Equal blocks whose inputs get shorter."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.AvgPool1d(2) for _ in range(8))
        self.head = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x).mean()


def test_blocks_on_other_shapes_are_told_apart(caplog: Any) -> None:
    _, log = _check(Ladder(), caplog, x=torch.ones(1, 1, 256))
    assert "no blocks are equal" in log[0]


class Bias(nn.Module):
    """Adds to a tensor that all blocks are given."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, shared: Tensor) -> Tensor:
        return torch.tanh(self.linear(x) + shared)


class Shared(nn.Module):
    """Blocks that all read one tensor, whose gradient is the sum of theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.source = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(Bias() for _ in range(10))

    def forward(self, x: Tensor) -> Tensor:
        shared = self.source(x)
        for block in self.blocks:
            x = block(x, shared)
        return x.square().mean()


@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_tensor_that_all_blocks_read_gets_the_gradients_of_all(requires_grad: bool, caplog: Any) -> None:
    _, log = _check(Shared(), caplog, x=X.clone().requires_grad_(requires_grad))
    assert "are stamped from" in log[0]
