"""The Trainer on a compiled model trains, evaluates, saves and resumes as the Trainer with DDP."""

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.launched import launched

from fxzero.testing import run_ranks

pytestmark = pytest.mark.skipif(
    find_spec("accelerate") is None or find_spec("transformers") is None, reason="needs accelerate and transformers"
)
ROWS = [torch.randint(2, 64, (length,), generator=torch.Generator().manual_seed(length)) for length in (8, 7, 6, 9) * 4]


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    ids = torch.stack([torch.nn.functional.pad(row["input_ids"], (0, 9 - len(row["input_ids"]))) for row in rows])
    return {"input_ids": ids, "labels": ids.masked_fill(ids == 0, -100)}


def make_model() -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=1, n_head=2, n_embd=8, vocab_size=64, n_positions=16, bos_token_id=0, eos_token_id=1, use_cache=False
    )
    return transformers.GPT2LMHeadModel(config)


def make_trainer(cls: Any, folder: str, model: Any = None, **options: Any) -> Any:
    import transformers
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    arguments = transformers.TrainingArguments(
        folder,
        use_cpu=True,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        max_steps=4,
        save_steps=2,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    rows = [{"input_ids": row} for row in ROWS]
    return cls(
        model=model or make_model(),
        args=arguments,
        data_collator=collate,
        train_dataset=rows,
        eval_dataset=rows[:4],
        callbacks=[],
    )


def numbers(trainer: Any) -> list[float]:
    keys = ("loss", "grad_norm", "learning_rate", "eval_loss", "total_flos")
    return [entry[key] for entry in trainer.state.log_history for key in keys if key in entry]


def train_as_ddp(rank: int, world_size: int, folder: str) -> None:
    import transformers

    from fxzero.stacks.transformers import Trainer

    transformers.trainer.logger.setLevel(logging.ERROR)
    with launched(rank, world_size):
        expected = make_trainer(transformers.Trainer, f"{folder}/ddp")
        expected.train()
        expected.evaluate()
        trainer = make_trainer(Trainer, f"{folder}/zero")
        trainer.train()
        trainer.evaluate()
        assert trainer.model_wrapped is trainer.zero
        torch.testing.assert_close(numbers(trainer), numbers(expected), rtol=1e-5, atol=1e-6)
        weights = trainer.zero.state_dict()
        own = {name: tensor.detach() for name, tensor in expected.model.named_parameters()}
        torch.testing.assert_close({name: weights[name] for name in own}, own, rtol=1e-5, atol=1e-5)

        trainer.save_model()  # a folder to push
        torch.distributed.barrier()
        saved = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/zero")
        loaded = {name: tensor.detach() for name, tensor in saved.named_parameters()}
        torch.testing.assert_close(loaded, {name: weights[name] for name in loaded}, rtol=0, atol=0)

        resumed = make_trainer(Trainer, f"{folder}/zero", model=saved)
        resumed.train(resume_from_checkpoint=f"{folder}/zero/checkpoint-2")
        assert resumed.state.global_step == 4
        torch.testing.assert_close(resumed.zero.state_dict(), weights, rtol=0, atol=0)
        with pytest.raises(ValueError, match="pass the plain one"):
            make_trainer(Trainer, folder, model=resumed.zero)


def make_adapted() -> Any:
    import peft

    torch.manual_seed(1)
    return peft.get_peft_model(make_model(), peft.LoraConfig(r=2, modules_to_save=["lm_head"], task_type="CAUSAL_LM"))


def train_adapters(rank: int, world_size: int, folder: str) -> None:
    import transformers
    from safetensors.torch import load_file

    from fxzero.stacks.transformers import Trainer

    transformers.trainer.logger.setLevel(logging.ERROR)
    with launched(rank, world_size):
        for name, cls in (("ddp", transformers.Trainer), ("zero", Trainer)):
            trainer = make_trainer(cls, f"{folder}/{name}", make_adapted())
            trainer.train()
            trainer.save_model()
            torch.distributed.barrier()
        files = [load_file(f"{folder}/{name}/adapter_model.safetensors") for name in ("ddp", "zero")]
        torch.testing.assert_close(files[1], files[0], rtol=1e-5, atol=1e-5)


def train_from_meta(rank: int, world_size: int, folder: str) -> None:
    import transformers

    import fxzero
    from fxzero.stacks.transformers import Trainer

    class Loading(Trainer):
        def compile_model(self, model: Any, optimizer: Any) -> fxzero.ZeroModule:
            zero = super().compile_model(model, optimizer)
            fxzero.load_pretrained(zero, f"{folder}/base")
            return zero

    transformers.trainer.logger.setLevel(logging.ERROR)
    with launched(rank, world_size):
        model = make_model()
        model.save_pretrained(f"{folder}/base")
        with torch.device("meta"):
            first, second = (transformers.GPT2LMHeadModel(model.config) for _ in range(2))
        expected = make_trainer(transformers.Trainer, f"{folder}/plain")
        expected.train()
        trainer = make_trainer(Loading, f"{folder}/meta", first)
        trainer.train()
        torch.testing.assert_close(numbers(trainer), numbers(expected), rtol=1e-5, atol=1e-6)

        resumed = make_trainer(Trainer, f"{folder}/resumed", second)
        resumed.train(resume_from_checkpoint=f"{folder}/plain/checkpoint-2")
        weights = resumed.zero.state_dict()
        own = {name: tensor.detach() for name, tensor in expected.model.named_parameters()}
        torch.testing.assert_close({name: weights[name] for name in own}, own, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(find_spec("peft") is None, reason="needs peft")
@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.exhaustive)])
def test_adapters_are_saved_as_with_ddp(world_size: int, tmp_path: Path) -> None:
    run_ranks(world_size, train_adapters, str(tmp_path), timeout=240)


def test_a_model_on_meta_trains_as_with_its_weights(tmp_path: Path) -> None:
    run_ranks(1, train_from_meta, str(tmp_path), timeout=240)


@pytest.mark.parametrize("world_size", [2, *(pytest.param(n, marks=pytest.mark.exhaustive) for n in (1, 3))])
def test_trainer_does_as_with_ddp(world_size: int, tmp_path: Path) -> None:
    run_ranks(world_size, train_as_ddp, str(tmp_path), timeout=240)
