"""The models: sizes, equality with transformers, ties, and initialisation after a build on the meta device."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxzero.models import (
    GPT,
    GPT_PRESETS,
    LLAMA_PRESETS,
    MLP,
    MLP_PRESETS,
    ROBERTA_PRESETS,
    GPTConfig,
    Llama,
    LlamaConfig,
    LMOutput,
    MLPConfig,
    RobertaConfig,
    RobertaForMaskedLM,
)

SMALL_BUILDS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: MLP(MLP_PRESETS["odd"]),
    "mlp-tied": lambda: MLP(MLP_PRESETS["tied"]),
    "gpt": lambda: GPT(GPT_PRESETS["tiny"]),
    "gpt-untied": lambda: GPT(replace(GPT_PRESETS["tiny"], tied=False)),
    "llama": lambda: Llama(LLAMA_PRESETS["tiny"]),
    "llama-tied": lambda: Llama(replace(LLAMA_PRESETS["tiny"], tied=True)),
    "roberta": lambda: RobertaForMaskedLM(ROBERTA_PRESETS["tiny"]),
}


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def tokens(*shape: int, low: int = 4, high: int = 128) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(1))


def materialize(model: nn.Module) -> None:
    """Give a model on the meta device memory and values; swapping keeps tied parameters tied."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.to_empty(device="cpu")
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    for module in model.modules():
        reset: Any = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()


# Sizes


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda: GPT(GPT_PRESETS["small"]), 124_439_808),
        (lambda: GPT(GPT_PRESETS["xl"]), 1_557_611_200),
        (lambda: Llama(LLAMA_PRESETS["7b"]), 6_738_415_616),
        (lambda: Llama(LLAMA_PRESETS["8b"]), 8_030_261_248),
        (lambda: RobertaForMaskedLM(ROBERTA_PRESETS["base"]), 124_697_433),
        (lambda: RobertaForMaskedLM(ROBERTA_PRESETS["large"]), 355_412_057),
    ],
    ids=["gpt-small", "gpt-xl", "llama-7b", "llama-8b", "roberta-base", "roberta-large"],
)
def test_presets_have_the_published_number_of_parameters(build: Callable[[], nn.Module], expected: int):
    with torch.device("meta"):
        assert num_parameters(build()) == expected


@pytest.mark.parametrize(
    ("preset", "low", "high"),
    [("mini", 3e6, 5e6), ("10b", 10.1e9, 10.2e9), ("50b", 51.9e9, 52.2e9)],
)
def test_roberta_presets_have_about_the_size_in_their_name(preset: str, low: float, high: float):
    with torch.device("meta"):
        assert low < num_parameters(RobertaForMaskedLM(ROBERTA_PRESETS[preset])) < high


@pytest.mark.parametrize("preset", MLP_PRESETS)
def test_mlp_maps_features_when_called(preset: str):
    config = MLP_PRESETS[preset]
    assert MLP(config)(torch.randn(6, config.in_features)).shape == (6, config.out_features)


@pytest.mark.parametrize("name", ["gpt", "llama", "roberta"])
def test_language_models_return_loss_and_logits_when_labelled(name: str):
    model = SMALL_BUILDS[name]()
    input_ids = tokens(2, 9)

    output = model(input_ids, labels=input_ids)

    assert isinstance(output, LMOutput)
    assert output.logits.shape == (2, 9, 128)
    assert output.loss is not None and output.loss.shape == () and 4.0 < output.loss.item() < 6.0
    assert len(pytree.tree_leaves(output)) == 2
    assert model(input_ids).loss is None


# Equality with the originals


def copy_parameters(target: nn.Module, source: dict[str, Tensor]) -> None:
    """Copy by name, everything, strictly."""
    missing, unexpected = target.load_state_dict(source, strict=True)
    assert not missing and not unexpected


def rename(state: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """Replace parts of names, in the order given."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        for old, new in names.items():
            name = name.replace(old, new)
        renamed[name] = tensor
    return renamed


def assert_same_loss_logits_and_gradients(ours: Any, theirs: Any, mine: Tensor, their: Tensor) -> None:
    """Compare two outputs, and the gradients of one parameter that everything flows back to."""
    torch.testing.assert_close(ours.logits, theirs.logits)
    torch.testing.assert_close(ours.loss, theirs.loss)
    (my_grad,) = torch.autograd.grad(ours.loss, mine)
    (their_grad,) = torch.autograd.grad(theirs.loss, their)
    torch.testing.assert_close(my_grad, their_grad)


def transformers_model(name: str, config_name: str, **options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    return getattr(transformers, name)(getattr(transformers, config_name)(**options)).eval()


@pytest.mark.parametrize("padded", [False, True])
def test_roberta_equals_transformers_when_given_its_weights(padded: bool):
    config = RobertaConfig(vocab_size=99, max_positions=20, hidden_size=24, ffn_size=40, num_layers=2, num_heads=3)
    theirs = transformers_model(
        "RobertaForMaskedLM",
        "RobertaConfig",
        vocab_size=99,
        max_position_embeddings=20,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        pad_token_id=1,
    )
    ours = RobertaForMaskedLM(config).eval()
    for parameter in theirs.parameters():
        parameter.data.normal_(std=0.3)
    names = {
        "roberta.encoder.layer.": "layers.",
        "roberta.": "",
        "word_embeddings": "word",
        "position_embeddings": "position",
        "token_type_embeddings": "token_type",
        "embeddings.LayerNorm": "embeddings.norm",
        "attention.self.query": "attention.q",
        "attention.self.key": "attention.k",
        "attention.self.value": "attention.v",
        "attention.output.dense": "attention.o",
        "attention.output.LayerNorm": "attention_norm",
        "intermediate.dense": "mlp.up",
        "output.dense": "mlp.down",
        "output.LayerNorm": "mlp_norm",
        "lm_head.layer_norm": "lm_head.norm",
        "lm_head.decoder.": "lm_head.",
    }
    copy_parameters(ours, rename(theirs.state_dict(), names))
    input_ids = tokens(3, 11, high=99)
    mask = torch.ones_like(input_ids)
    if padded:
        input_ids[1, 7:] = input_ids[2, 4:] = 1
        mask = input_ids.ne(1).long()
    labels = torch.where(torch.arange(11) % 3 == 0, input_ids, -100)

    my_output = ours(input_ids, attention_mask=mask if padded else None, labels=labels)
    their_output = theirs(input_ids, attention_mask=mask, labels=labels)

    assert_same_loss_logits_and_gradients(
        my_output, their_output, ours.embeddings.word.weight, theirs.get_input_embeddings().weight
    )


def test_gpt_equals_transformers_when_given_its_weights():
    config = GPTConfig(vocab_size=99, max_positions=20, hidden_size=24, num_layers=2, num_heads=3)
    theirs = transformers_model(
        "GPT2LMHeadModel", "GPT2Config", vocab_size=99, n_positions=20, n_embd=24, n_layer=2, n_head=3
    )
    ours = GPT(config).eval()
    for parameter in theirs.parameters():
        parameter.data.normal_(std=0.3)
    names = {
        "transformer.h.": "layers.",
        "transformer.": "",
        "wte": "token_embedding",
        "wpe": "position_embedding",
        "ln_f": "norm",
        "ln_1": "attention_norm",
        "ln_2": "mlp_norm",
        "attn.c_proj": "attention.o",
        "mlp.c_fc": "mlp.up",
        "mlp.c_proj": "mlp.down",
        "lm_head": "head",
    }
    state: dict[str, Tensor] = {}
    for name, tensor in rename(theirs.state_dict(), names).items():
        # transformers keeps GPT-2's linears as [in, out], and q, k, v in one.
        tensor = tensor.t() if name.startswith("layers.") and tensor.dim() == 2 else tensor
        if "attn.c_attn" in name:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                state[name.replace("attn.c_attn", f"attention.{letter}")] = part
        else:
            state[name] = tensor
    copy_parameters(ours, state)
    input_ids = tokens(2, 11, high=99)

    my_output = ours(input_ids, labels=input_ids)
    their_output = theirs(input_ids, labels=input_ids)

    assert_same_loss_logits_and_gradients(
        my_output, their_output, ours.token_embedding.weight, theirs.get_input_embeddings().weight
    )


def test_llama_equals_transformers_when_given_its_weights():
    config = LlamaConfig(
        vocab_size=99, max_positions=20, hidden_size=24, ffn_size=40, num_layers=2, num_heads=6, num_kv_heads=2
    )
    theirs = transformers_model(
        "LlamaForCausalLM",
        "LlamaConfig",
        vocab_size=99,
        max_position_embeddings=20,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
    )
    ours = Llama(config).eval()
    for parameter in theirs.parameters():
        parameter.data.normal_(std=0.3)
    names = {
        "model.": "",
        "lm_head": "head",
        "embed_tokens": "token_embedding",
        "self_attn": "attention",
        "_proj": "",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "mlp_norm",
    }
    copy_parameters(ours, rename(theirs.state_dict(), names))
    input_ids = tokens(2, 11, high=99)

    my_output = ours(input_ids, labels=input_ids)
    their_output = theirs(input_ids, labels=input_ids)

    assert_same_loss_logits_and_gradients(
        my_output, their_output, ours.token_embedding.weight, theirs.get_input_embeddings().weight
    )


# Ties, initialisation, refusals


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("mlp-tied", "layers.0.linear.weight", "layers.3.weight"),
        ("gpt", "token_embedding.weight", "head.weight"),
        ("llama-tied", "token_embedding.weight", "head.weight"),
        ("roberta", "embeddings.word.weight", "lm_head.weight"),
    ],
)
def test_tied_weights_are_one_parameter_when_built(name: str, first: str, second: str):
    model = SMALL_BUILDS[name]()
    assert model.get_parameter(first) is model.get_parameter(second)
    assert first in dict(model.named_parameters())
    assert second not in dict(model.named_parameters())


@pytest.mark.parametrize(
    ("name", "drawn_twice"),
    [
        ("mlp", set[str]()),
        ("mlp-tied", {"layers.0.linear.weight"}),
        ("gpt", {"token_embedding.weight"}),
        ("gpt-untied", set[str]()),
        ("llama", set[str]()),
        ("llama-tied", {"token_embedding.weight"}),
        ("roberta", set[str]()),
    ],
)
def test_reset_parameters_equals_a_direct_build_when_built_on_meta(name: str, drawn_twice: set[str]):
    torch.manual_seed(3)
    direct = SMALL_BUILDS[name]()
    with torch.device("meta"):
        model = SMALL_BUILDS[name]()
    assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])

    torch.manual_seed(3)
    materialize(model)

    expected = dict(direct.named_parameters()) | dict(direct.named_buffers())
    actual = dict(model.named_parameters()) | dict(model.named_buffers())
    assert actual.keys() == expected.keys()
    for fqn, tensor in actual.items():
        if fqn in drawn_twice:
            torch.testing.assert_close(tensor.std(), expected[fqn].std(), rtol=0.2, atol=0.0)
        else:
            assert torch.equal(tensor, expected[fqn]), fqn


def test_padding_rows_are_zero_when_roberta_is_built():
    model = RobertaForMaskedLM(ROBERTA_PRESETS["tiny"])
    assert not model.embeddings.word.weight[1].any()
    assert not model.embeddings.position.weight[1].any()
    assert model.embeddings.word.weight[0].std().item() == pytest.approx(0.02, rel=0.5)


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (lambda: MLPConfig(num_layers=1), "num_layers is 1"),
        (lambda: MLPConfig(tied=True), "one width"),
        (lambda: GPTConfig(num_heads=5), "num_heads 5"),
        (lambda: LlamaConfig(num_kv_heads=5), "num_kv_heads 5"),
        (lambda: LlamaConfig(hidden_size=20, num_heads=4), "multiple of 2"),
        (lambda: RobertaConfig(num_heads=5), "num_heads 5"),
    ],
)
def test_config_names_the_field_when_it_is_wrong(refused: Callable[[], object], message: str):
    with pytest.raises(ValueError, match=message):
        refused()


@pytest.mark.parametrize(("name", "limit"), [("gpt", 32), ("llama", 32), ("roberta", 32)])
def test_language_models_refuse_when_the_sequence_is_too_long(name: str, limit: int):
    model = SMALL_BUILDS[name]()
    model(tokens(1, limit))
    with pytest.raises(ValueError, match=f"{limit + 1} tokens"):
        model(tokens(1, limit + 1))
