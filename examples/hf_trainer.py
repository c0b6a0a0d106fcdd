"""The Hugging Face Trainer: `torchrun --nproc-per-node 2 examples/hf_trainer.py OUTPUT`.

Called again, it resumes from the newest checkpoint in OUTPUT. In the end OUTPUT is a folder for `from_pretrained`.
"""

import os
import sys

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from fxzero.stacks.transformers import Trainer

TINY = LlamaConfig(
    vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, use_cache=False
)


def main(output: str) -> None:
    """Train, and save a folder to push."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(TINY)  # or from_pretrained
    rows = torch.randint(TINY.vocab_size, (16, 12))
    arguments = TrainingArguments(
        output,
        max_steps=4,
        save_steps=2,
        logging_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        compile_options={"recompute": "none"},  # anything that fxzero.compile takes
    )
    last = get_last_checkpoint(output) if os.path.isdir(output) else None
    trainer.train(resume_from_checkpoint=last)
    trainer.save_model()


if __name__ == "__main__":
    main(sys.argv[1])
