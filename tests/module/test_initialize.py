"""Meta models get the values of eager construction, one module at a time, or an error that names what lacks them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from fxzero.errors import CheckpointError
from fxzero.models import (
    GPT,
    GPT_PRESETS,
    LLAMA_PRESETS,
    MLP,
    MLP_PRESETS,
    ROBERTA_PRESETS,
    Llama,
    RobertaForMaskedLM,
)
from fxzero.module.initialize import check_meta_model, initialize, rng_state


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


def fill(model: nn.Module, seed: int = 0, **options: Any) -> dict[str, Tensor]:
    """The parameters that `initialize` stores, by name."""
    stored: dict[str, Tensor] = {}

    def store(fqn: str, value: Tensor) -> None:
        assert fqn not in stored
        stored[fqn] = value

    torch.manual_seed(seed)
    initialize(model, device="cpu", store=store, **options)
    return stored


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(got) == list(expected) or got.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(got[name], expected[name])] == []


class TiedNet(nn.Module):
    """The usual way to tie: the later module takes the earlier one's weight. Parameters follow the tie."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11)
        self.head.weight = self.embedding.weight
        self.tail = nn.Linear(11, 3)


class Token(nn.Module):
    """Parameters of its own, beside a child, drawn at the end of its construction; it refines the child."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.empty(1, 5))
        self.proj = nn.Linear(5, 5)
        self.register_buffer("positions", torch.arange(7), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.token, std=0.02)
        nn.init.zeros_(self.proj.bias)
        self.positions = torch.arange(7)  # binds another tensor, as many models do


def plain_modules() -> nn.Module:
    return nn.Sequential(
        nn.Embedding(10, 4, padding_idx=0),
        nn.Linear(4, 8),
        nn.LayerNorm(8),
        nn.Conv2d(2, 3, 3, bias=False),
        nn.BatchNorm2d(3),
        nn.Sequential(nn.GroupNorm(2, 4), nn.PReLU(), nn.Bilinear(2, 3, 4)),
        nn.MultiheadAttention(8, 2),
        nn.LSTM(4, 4, num_layers=2),
        nn.RMSNorm(4),
        Token(),
        nn.Linear(4, 2),
    )


EAGER: dict[str, Callable[[], nn.Module]] = {
    "plain": plain_modules,
    "tied": TiedNet,
    "mlp": lambda: MLP(MLP_PRESETS["tiny"]),
    "mlp-tied": lambda: MLP(MLP_PRESETS["tied"]),
    "gpt": lambda: GPT(GPT_PRESETS["tiny"]),
    "gpt-untied": lambda: GPT(replace(GPT_PRESETS["tiny"], tied=False)),
    "llama": lambda: Llama(LLAMA_PRESETS["tiny"]),
    "roberta": lambda: RobertaForMaskedLM(ROBERTA_PRESETS["tiny"]),
}


@pytest.mark.parametrize("name", EAGER)
def test_values_equal_eager_construction_when_seeded_alike(name: str):
    torch.manual_seed(3)
    eager = EAGER[name]()
    drawn = torch.get_rng_state()
    model = on_meta(EAGER[name])
    params = dict(model.named_parameters())
    check_meta_model(model)
    stored = fill(model, seed=3)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert_equal(stored, {name: param.detach() for name, param in eager.named_parameters()})
    assert_equal(dict(model.named_buffers()), dict(eager.named_buffers()))
    assert {name: id(param) for name, param in model.named_parameters()} == {n: id(p) for n, p in params.items()}
    assert all(param.is_meta for param in model.parameters())
    assert list(model.state_dict()) == list(eager.state_dict())


@pytest.mark.parametrize("name", ["gpt", "gpt-untied", "llama", "roberta"])
def test_only_one_module_is_full_when_initialising(name: str):
    model = on_meta(EAGER[name])
    largest = max(sum(p.nbytes for p in module.parameters(recurse=False)) for module in model.modules())
    num_stored = 0

    def store(fqn: str, value: Tensor) -> None:
        nonlocal num_stored
        num_stored += 1

    with LiveBytes() as live:
        initialize(model, device="cpu", store=store)
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert num_stored == len(list(model.parameters()))
    assert live.peak <= largest + buffers + rng_state("cpu").nbytes + 64


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all real storages that were made under it and are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not result.is_meta:
            storage = result.untyped_storage()
            self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.alive = {key: (ref, size) for key, (ref, size) in self.alive.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


# -- Hugging Face ------------------------------------------------------------------------------------------------


def hugging_face(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    if name == "GPT2LMHeadModel":
        config = transformers.GPT2Config(n_layer=2, n_embd=64, n_head=4, vocab_size=500, bos_token_id=0, eos_token_id=0)
    elif name == "T5ForConditionalGeneration":
        config = transformers.T5Config(num_layers=2, d_model=64, num_heads=4, d_ff=96, d_kv=16, vocab_size=500)
    elif name == "ViTForImageClassification":
        config = transformers.ViTConfig(**sizes, image_size=32, patch_size=8)
    else:
        family = {"LlamaForCausalLM": "Llama", "BertForMaskedLM": "Bert", "RobertaForMaskedLM": "Roberta"}[name]
        config = getattr(transformers, f"{family}Config")(**sizes, vocab_size=500)
    return getattr(transformers, name)(config)


HUGGING_FACE = (
    "GPT2LMHeadModel",
    "LlamaForCausalLM",
    "BertForMaskedLM",
    "RobertaForMaskedLM",
    "T5ForConditionalGeneration",
    "ViTForImageClassification",
)


@pytest.mark.parametrize("name", HUGGING_FACE)
@pytest.mark.filterwarnings("ignore")
def test_hugging_face_models_have_their_distributions_and_buffers(name: str):
    eager = hugging_face(name)
    model = on_meta(lambda: hugging_face(name))
    check_meta_model(model)
    stored = fill(model)
    assert list(stored) and stored.keys() == dict(eager.named_parameters()).keys()
    for fqn, param in eager.named_parameters():
        expected, got = param.detach(), stored[fqn]
        if expected.std() == 0:
            assert torch.equal(got, expected), fqn
        else:
            tolerance = 6 / (2 * expected.numel()) ** 0.5
            torch.testing.assert_close(got.std(), expected.std(), rtol=tolerance, atol=0, msg=fqn)
            torch.testing.assert_close(got.mean(), expected.mean(), rtol=0, atol=2 * tolerance * expected.std().item())
    buffers = dict(model.named_buffers())
    assert_equal(buffers, dict(eager.named_buffers()))
    assert {name: b.dtype for name, b in buffers.items()} == {name: b.dtype for name, b in eager.named_buffers()}
    for module in eager.modules():
        vars(module).pop("_is_hf_initialized", None)
    torch.manual_seed(0)
    eager.initialize_weights()  # pyright: ignore[reportCallIssue]
    same = [fqn for fqn, param in eager.named_parameters() if torch.equal(param, stored[fqn])]
    if name != "T5ForConditionalGeneration":  # there a parent draws its children again, after all of them
        assert len(same) >= len(stored) - 1  # a tied weight keeps its first draw here and its second there


# -- who initialises ---------------------------------------------------------------------------------------------


class Holder(nn.Module):
    """Initialises its modules by `_init_weights`, but leaves norms and biases to their constructors."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.norm = nn.LayerNorm(4)
        self.register_buffer("scale", torch.full((2,), 3.0))

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            module.weight.data.fill_(0.25)
        if module is self:
            self.scale.fill_(3.0)  # pyright: ignore[reportCallIssue]


def test_defaults_fill_what_init_weights_leaves():
    model = on_meta(lambda: nn.Sequential(nn.Linear(2, 2), Holder()))
    stored = fill(model)
    assert torch.equal(stored["1.linear.weight"], torch.full((4, 3), 0.25))
    assert torch.equal(stored["1.norm.weight"], torch.ones(4))
    assert 0 < stored["1.linear.bias"].abs().max() <= 3**-0.5
    assert torch.equal(model[1].scale, torch.full((2,), 3.0))  # pyright: ignore[reportIndexIssue]


def test_init_fn_comes_first_and_defaults_fill_the_rest():
    def init(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.constant_(module.weight, 2.0)

    stored = fill(on_meta(lambda: nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), Holder())), init_fn=init)
    assert torch.equal(stored["0.weight"], torch.full((3, 3), 2.0))
    assert torch.equal(stored["2.linear.weight"], torch.full((4, 3), 2.0))
    assert torch.equal(stored["1.weight"], torch.ones(3))


def test_init_fn_serves_modules_without_initialisers():
    def init(module: nn.Module) -> None:
        if isinstance(module, Bare):
            module.w.data.fill_(1.0)

    model = on_meta(Bare)
    check_meta_model(model, init)
    assert torch.equal(fill(model, init_fn=init)["w"], torch.ones(3))


def test_ancestors_refine_what_their_children_drew():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))

        def reset_parameters(self) -> None:
            for param in self.parameters():
                nn.init.normal_(param, mean=2.0, std=0.1)

    for value in fill(on_meta(lambda: nn.Sequential(Scaled()))).values():
        assert 1.9 < value.mean() < 2.1
        assert 0.05 < value.std() < 0.15


def test_common_ancestor_refines_a_tied_weight_by_any_of_its_names():
    class Root(TiedNet):
        def reset_parameters(self) -> None:
            nn.init.constant_(self.head.weight, 0.5)

    stored = fill(on_meta(Root))
    assert torch.equal(stored["embedding.weight"], torch.full((11, 6), 0.5))
    assert "head.weight" not in stored


def test_marks_on_parameters_are_seen_but_not_that_of_transformers():
    seen: list[tuple[bool, bool]] = []

    class Marked(nn.Linear):
        def reset_parameters(self) -> None:
            seen.append((hasattr(self.weight, "keep"), hasattr(self.weight, "_is_hf_initialized")))
            super().reset_parameters()

    model = on_meta(lambda: Marked(2, 2))
    seen.clear()
    vars(model.weight).update(keep=True, _is_hf_initialized=True)
    fill(model)
    assert seen == [(True, False)]


# -- what is left alone ------------------------------------------------------------------------------------------


def test_real_tensors_stay_when_others_are_on_meta():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    assert isinstance(model[0], nn.Linear)
    model[0].bias = nn.Parameter(torch.empty(3, device="meta"))
    before = {name: (id(tensor), tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    assert list(fill(model)) == ["0.bias"]
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert id(tensor) == before[name][0]
        assert tensor.is_meta or torch.equal(tensor, before[name][1])


def test_nothing_is_drawn_when_the_model_is_real():
    model = plain_modules()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    check_meta_model(model)
    assert fill(model) == {}
    assert torch.equal(state, torch.get_rng_state())


def test_loaded_names_are_skipped_but_not_the_buffers_beside_them():
    model = on_meta(lambda: nn.Sequential(Token(), nn.BatchNorm1d(2)))
    model[1].running_mean = torch.tensor([5.0, 6.0])  # pyright: ignore[reportIndexIssue]
    skip = {"0.token", "0.proj.weight", "0.proj.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"}
    assert fill(model, skip=skip) == {}
    buffers = dict(model.named_buffers())
    assert torch.equal(buffers["0.positions"], torch.arange(7))
    assert torch.equal(buffers["1.running_mean"], torch.tensor([5.0, 6.0]))
    assert buffers["1.running_var"].is_meta
    assert not buffers["1.num_batches_tracked"].is_meta


def test_tied_parameter_is_skipped_by_any_of_its_names():
    assert "embedding.weight" not in fill(on_meta(TiedNet), skip={"head.weight"})


# -- errors ------------------------------------------------------------------------------------------------------


class Bare(nn.Module):
    """A parameter that nothing fills."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(3))


class Lazy(Bare):
    """Has an initialiser that fills nothing."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.register_buffer("table", torch.empty(3, dtype=dtype))

    def reset_parameters(self) -> None:
        self.w.data.zero_()


def test_module_is_named_when_it_has_no_initialiser():
    model = on_meta(lambda: nn.Sequential(nn.Linear(2, 2), nn.Sequential(Bare())))
    with pytest.raises(CheckpointError, match=r"1\.0\.w is on the meta device, Bare has no reset_parameters.*init_fn="):
        check_meta_model(model)
    check_meta_model(model, skip={"1.0.w"})
    with pytest.raises(CheckpointError, match=r"1\.0\.w \(3,\) .*no initialiser of Bare"):
        fill(model)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64]
)
def test_tensor_is_named_when_nobody_fills_it(dtype: torch.dtype):
    model = on_meta(lambda: nn.Sequential(Lazy(dtype)))
    params = list(model.parameters())
    check_meta_model(model)
    with pytest.raises(
        CheckpointError, match=r"0\.table \(3,\) .*no initialiser of Lazy .* Give Lazy a reset_parameters"
    ):
        fill(model)
    assert all(a is b and a.is_meta for a, b in zip(model.parameters(), params, strict=True))
    assert all(buffer.is_meta for buffer in model.buffers())


@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: [t], lambda t: {"k": t}], ids=["tensor", "list", "dict"])
def test_plain_attribute_is_named_when_it_is_on_meta(wrap: Callable[[Tensor], Any]):
    class Rotary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inv_freq = wrap(torch.arange(4))

    with pytest.raises(CheckpointError, match=r"0\.inv_freq is on the meta device and a plain attribute of Rotary"):
        check_meta_model(on_meta(lambda: nn.Sequential(Rotary())))


def test_plain_reference_to_a_parameter_is_fine():
    model = on_meta(lambda: nn.Sequential(nn.Linear(2, 2)))
    vars(model)["watched"] = [model[0].weight]  # pyright: ignore[reportIndexIssue]
    check_meta_model(model)


def test_initialiser_is_named_when_it_reads_other_modules():
    class Copying(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

        def reset_parameters(self) -> None:
            self.b.weight.data.copy_(self.a.weight)

    with pytest.raises(
        CheckpointError, match=r"initialiser of Copying \(0\) failed while .* of Linear \(0\.b\) were real"
    ):
        fill(on_meta(lambda: nn.Sequential(Copying())))


def test_error_of_an_initialiser_is_kept_and_placed():
    def init(module: nn.Module) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine") as caught:
        fill(on_meta(lambda: nn.Sequential(nn.Linear(2, 2))), init_fn=init)
    assert getattr(caught.value, "__notes__", ["Linear (0)"])[0].count("Linear (0)")


def test_initialiser_is_refused_when_it_changes_a_shape():
    def init(module: nn.Module) -> None:
        module.weight = nn.Parameter(torch.ones(5))

    with pytest.raises(
        CheckpointError, match=r"weight replaced it by torch.float32 \(5,\); it was torch.float32 \(2, 2\)"
    ):
        fill(on_meta(lambda: nn.Linear(2, 2)), init_fn=init)


# -- draws -------------------------------------------------------------------------------------------------------


def test_ranks_draw_alike_when_they_are_seeded_differently():
    torch.manual_seed(7)
    state = rng_state("cpu")
    assert torch.equal(state, torch.get_rng_state())
    rank0 = fill(on_meta(plain_modules), seed=7, generator_state=state)
    advanced = torch.get_rng_state()
    assert not torch.equal(advanced, state)  # as after eager construction

    torch.manual_seed(8)
    own = torch.get_rng_state()
    rank1 = fill(on_meta(plain_modules), seed=8, generator_state=state)
    assert torch.equal(torch.get_rng_state(), own)
    assert_equal(rank1, rank0)


def test_generator_state_is_refused_when_it_is_of_another_device():
    with pytest.raises(ValueError, match="generator_state has 5072 bytes"):
        fill(on_meta(plain_modules), generator_state=torch.zeros(5072, dtype=torch.uint8))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_draws_equal_eager_construction_and_rank0():
    torch.manual_seed(3)
    with torch.device("cuda"):
        eager = {name: param.detach() for name, param in plain_modules().named_parameters()}
    torch.manual_seed(3)
    state = rng_state("cuda")
    for seed in (3, 4):
        torch.manual_seed(seed)
        stored: dict[str, Tensor] = {}
        initialize(on_meta(plain_modules), device="cuda", store=stored.__setitem__, generator_state=state)
        assert_equal(stored, eager)
    torch.manual_seed(4)
    assert torch.equal(torch.cuda.get_rng_state(), rng_state("cuda")[torch.get_rng_state().numel() :])
