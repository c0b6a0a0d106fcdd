"""Hugging Face models train unmodified: small configurations, otherwise their defaults, caches and dropout included."""

import copy
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxzero
from fxzero.passes import default_passes
from fxzero.testing import run_ranks
from tests.distributed import replicated

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("every_temporary_has_a_place")
Batch = dict[str, Tensor]
SMALL = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32, "vocab_size": 64}
TOKENS = {"bos_token_id": 0, "eos_token_id": 1}
CACHE = "past_key_values|cache"
"""What transformers call a cache in what models return: the first in older versions, the second in newer ones."""


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=64, n_positions=32, **TOKENS)
    )


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, num_key_value_heads=1, **TOKENS))


def bert() -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(**SMALL))


def bert_classifier() -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL, num_labels=3))


def roberta() -> nn.Module:
    return transformers.RobertaForMaskedLM(transformers.RobertaConfig(**SMALL))


def t5() -> nn.Module:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            num_layers=1, num_heads=2, d_model=16, d_kv=8, d_ff=32, vocab_size=64, decoder_start_token_id=0
        )
    )


def vit() -> nn.Module:
    small = {key: value for key, value in SMALL.items() if key != "vocab_size"}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**small, image_size=8, patch_size=4))


def text(seed: int, seq: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 64, (2, seq), generator=generator)
    mask = torch.ones(2, seq, dtype=torch.int64)
    mask[1, seq - 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def labelled_text(seed: int, seq: int = 8) -> Batch:
    return {**text(seed, seq), "labels": torch.tensor([0, 2])}


def image(seed: int, seq: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return {"pixel_values": torch.randn(2, 3, seq, seq, generator=generator), "labels": torch.tensor([0, 1])}


CASES: dict[str, replicated.Case] = {
    "gpt2": replicated.Case(gpt2, text),
    "llama": replicated.Case(llama, text),
    "bert": replicated.Case(bert, text),
    "bert_classifier": replicated.Case(bert_classifier, labelled_text),
    "roberta": replicated.Case(roberta, text),
    "t5": replicated.Case(t5, text),
    "vit": replicated.Case(vit, image),
}
ALIKE = ("gpt2", "bert_classifier", "roberta")  # much like the others


@pytest.fixture(autouse=True)
def _without_the_warning_of_caches() -> Iterator[None]:
    """Caches are on by default; one test below is about what fxzero says of them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", f"The model returns ({CACHE})", UserWarning)
        yield


def _step(model: Callable[..., Any], batch: Batch, seed: int) -> Any:
    torch.manual_seed(seed)
    output = model(**batch)
    output.loss.backward()
    return output


@pytest.mark.parametrize(
    "name",
    [*("llama", "bert", "t5", "vit"), *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ALIKE)],
)
def test_model_trains_as_in_eager_when_it_is_unmodified(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    model = case.build().train()
    reference = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    reference_optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2)
    zero = fxzero.compile(model, optimizer=optimizer, passes=default_passes(bucket_bytes=4096))
    for step in range(3):
        mine, theirs = (_step(each, case.batch(step, 8), step) for each in (zero, reference))
        assert type(mine) is type(theirs)
        assert torch.equal(mine.loss, theirs.loss)
        assert torch.equal(mine.logits, theirs.logits)
        replicated.assert_same(zero, reference, f"step {step}: gradient", lambda p: p.grad)
        optimizer.step()
        reference_optimizer.step()
        replicated.assert_same(zero, reference, f"step {step}: parameter", lambda p: p.data)
        optimizer.zero_grad()
        reference_optimizer.zero_grad()
    zero.eval()
    reference.eval()
    with torch.no_grad():
        mine, theirs = zero(**case.batch(9, 8)), reference(**case.batch(9, 8))
    assert torch.equal(mine.loss, theirs.loss)
    assert torch.equal(mine.logits, theirs.logits)
    assert zero.schedule.totals.num_reduce_scatters == 0


def train_on_rank(rank: int, world_size: int, name: str) -> str:
    """Worker: compare with replicated training."""
    warnings.filterwarnings("ignore", f"The model returns ({CACHE})", UserWarning)
    return replicated.train(rank, world_size, CASES[name], lengths=((8, 6), (8, 8)))


@pytest.mark.parametrize("name", ["gpt2", pytest.param("bert", marks=pytest.mark.exhaustive)])
def test_model_trains_as_replicated_when_there_are_two_ranks(name: str) -> None:
    schedules = run_ranks(2, train_on_rank, name)
    assert schedules[0] == schedules[1]


def test_cache_comes_back_as_none_with_one_warning_when_it_is_on() -> None:
    zero = fxzero.compile(gpt2())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        outputs = [zero(**text(0, seq)) for seq in (8, 8, 6)]
        with torch.no_grad():
            outputs.append(zero.eval()(**text(0)))
    assert [getattr(output, "cache", None) or output.past_key_values for output in outputs] == [None] * 4
    assert all(output.logits.shape[-1] == 64 for output in outputs)
    (warning,) = caught
    assert re.search(CACHE, str(warning.message)) and "use_cache=False" in str(warning.message)


def test_model_trains_when_it_was_built_on_the_meta_device() -> None:
    torch.manual_seed(0)
    with torch.device("meta"):
        model = llama()
    zero = fxzero.compile(model.train(), device="cpu")
    optimizer = torch.optim.AdamW(zero.parameters(), lr=1e-2)
    plain = llama().train()
    plain.load_state_dict(zero.state_dict())
    plain_optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    for step in range(2):
        mine, theirs = (_step(each, text(step), step) for each in (zero, plain))
        assert torch.equal(mine.loss, theirs.loss)
        optimizer.step()
        plain_optimizer.step()
        replicated.assert_same(zero, plain, f"step {step}: parameter", lambda p: p.data)
        optimizer.zero_grad()
        plain_optimizer.zero_grad()
