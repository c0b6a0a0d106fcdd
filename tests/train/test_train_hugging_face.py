"""`fxzero train --hf`: a folder of Hugging Face is fine-tuned, adapters or all of it, and plain libraries load it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from fxzero.commands.errors import CommandError
from fxzero.testing import run_ranks
from fxzero.train.batches import Batches, Windows
from fxzero.train.hf_folder import HfModel, check_folder, read_tokenizer
from fxzero.train.text import encode
from tests.train.train_workers import train

transformers: Any = pytest.importorskip("transformers")
LINES = "the quick brown fox jumps over the lazy dog; and so on.\n" * 400
SMALL = {"seq": 32, "eval_batches": 1, "lr": 0.01, "warmup": 0, "log_every": 1, "batch": 2}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(LINES)
    return path


def _make_folder(folder: Path, config: Any) -> Path:
    """A model that nobody has trained, and a tokenizer of some text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator([LINES], trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=120, **sizes, max_position_embeddings=64, eos_token_id=1)
    return _make_folder(tmp_path / "llama", config)


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    dropout = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    config = transformers.GPT2Config(
        vocab_size=120, n_embd=32, n_layer=2, n_head=2, n_positions=64, eos_token_id=1, **dropout
    )
    return _make_folder(tmp_path / "gpt2", config)


def _losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_adapters_of_two_ranks_go_on_alone_and_are_loaded_by_peft_and_merged(
    data: Path, gpt2: Path, tmp_path: Path
) -> None:
    peft: Any = pytest.importorskip("peft")
    out, again = tmp_path / "out", tmp_path / "again"
    given = {**SMALL, "hf": gpt2, "lora": 2, "data": data, "steps": 3, "save_every": 1, "keep": 9, "out": out}
    assert run_ranks(2, train, given, timeout=120) == [0, 0]
    assert run_ranks(1, train, {"resume": str(out / "checkpoints" / "000001"), "out": again}, timeout=120) == [0]
    assert _losses(again) == pytest.approx(_losses(out), rel=1e-5)

    base = transformers.AutoModelForCausalLM.from_pretrained(gpt2)
    merged = transformers.AutoModelForCausalLM.from_pretrained(again)
    ids = transformers.AutoTokenizer.from_pretrained(again)("the quick brown fox", return_tensors="pt").input_ids
    assert not torch.allclose(base(ids).logits, merged(ids).logits, atol=1e-3)
    adapted = peft.PeftModel.from_pretrained(base, again / "adapter").eval()
    assert torch.allclose(adapted(ids).logits, merged(ids).logits, atol=1e-5)
    expected = adapted.merge_and_unload().state_dict()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-7)


def test_a_whole_model_takes_the_steps_of_plain_pytorch(data: Path, llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run_ranks(1, train, {**SMALL, "hf": llama, "data": data, "steps": 2, "out": out}, timeout=120) == [0]

    found = read_tokenizer(llama)
    assert (found.bos_id, found.eos_id) == (None, 1)
    tokens = encode(found.tokenizer, [LINES[: int(len(LINES) * 0.95)]], found.eos_id)
    batches = Batches(Windows(tokens, 32, 0, None), 2, 120, masked=False, rank=0, world_size=1)
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    groups = [{"params": [p for p in model.parameters() if (p.ndim >= 2) == is_matrix]} for is_matrix in (True, False)]
    groups[1]["weight_decay"] = 0.0
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01, betas=(0.9, 0.98), fused=True)
    losses: list[float] = []
    for step, lr in enumerate((0.01, 0.005)):
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = model(**batches.batch_at(step), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert _losses(out) == pytest.approx(losses, rel=1e-6)
    written = load_file(out / "model.safetensors")
    assert written.keys() == load_file(llama / "model.safetensors").keys()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(written[name], tensor, rtol=0, atol=1e-6)


def test_folders_that_cannot_be_trained_are_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="--seq 65 is more than .*llama has positions for; at most 64"):
        HfModel(llama, 65)
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | {"architectures": ["BertForMaskedLM"]}))
    with pytest.raises(CommandError, match="has a BertForMaskedLM; models that predict the next token"):
        HfModel(llama, 64)
    (llama / "config.json").write_text(json.dumps({"model_type": "nothing"}))
    with pytest.raises(CommandError, match="transformers cannot make its model: "):
        HfModel(llama, 64)
    (llama / "tokenizer.json").unlink()
    with pytest.raises(CommandError, match="has no tokenizer.json"):
        check_folder(llama)
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    with pytest.raises(CommandError, match="Its .bin files are pickles, which are not read"):
        check_folder(llama)
    with pytest.raises(CommandError, match="has no config.json"):
        check_folder(tmp_path)
    with pytest.raises(CommandError, match="is no folder. Give one on this machine"):
        check_folder(tmp_path / "missing")
