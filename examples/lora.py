"""Fine-tune a Hugging Face model with LoRA: `torchrun --nproc-per-node 2 examples/lora.py [FOLDER]`.

FOLDER has a config and safetensors files, as `save_pretrained` writes them; without it a tiny model is made up. The
adapters are written to `adapters/`, from where `PeftModel.from_pretrained` loads them.
"""

import sys

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

import fxzero

TINY = LlamaConfig(
    vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, use_cache=False
)


def main() -> None:
    """Train adapters, and write them."""
    if dist.is_torchelastic_launched():
        dist.init_process_group()
    rank = dist.get_rank() if dist.is_initialized() else 0

    torch.manual_seed(0)
    if len(sys.argv) > 1:
        base = AutoModelForCausalLM.from_pretrained(sys.argv[1], use_cache=False)
    else:
        base = AutoModelForCausalLM.from_config(TINY)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=1e-3)
    zero = fxzero.compile(model, optimizer=optimizer)  # frozen weights are sharded too

    ids = torch.randint(base.config.vocab_size, (4, 16), generator=torch.Generator().manual_seed(rank))
    for step in range(5):
        loss = zero(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0:
            print(f"step {step}: loss {loss.item():.3f}")

    weights = zero.state_dict(rank0_only=True)  # on every rank
    if rank == 0:
        model.save_pretrained("adapters", state_dict=weights)


if __name__ == "__main__":
    main()
