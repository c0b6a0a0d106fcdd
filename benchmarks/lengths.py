"""Processor time that a new input length costs, beside a repeated one: lengths 1 to 6 of a Llama of transformers.

python benchmarks/lengths.py [layers]
"""

import sys
import time
import warnings

import torch
import transformers

import fxzero

LENGTHS = (24, 36, 52, 64, 41, 87)
BAR_S = 0.6
"""Seconds that the fourth and later lengths may cost with 24 layers."""


def llama(num_layers: int) -> torch.nn.Module:
    """A Llama of width 64."""
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=num_layers, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=256,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).train()


def step_s(zero: fxzero.ZeroModule, length: int, *, is_padded: bool) -> float:
    """Seconds of processor time of one step."""
    ids = torch.randint(3, 250, (2, length))
    batch = {"input_ids": ids, "labels": ids}
    if is_padded:
        mask = torch.ones_like(ids)
        mask[0, length // 2 :] = 0
        batch["attention_mask"] = mask
    zero.zero_grad()
    began = time.process_time()
    zero(**batch).loss.backward()
    return time.process_time() - began


def main() -> None:
    """Print what each length costs."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    num_layers = int(sys.argv[1]) if len(sys.argv) > 1 else 24
    for is_padded in (True, False):
        zero = fxzero.compile(llama(num_layers))
        for number, length in enumerate(LENGTHS, start=1):
            first = step_s(zero, length, is_padded=is_padded)
            again = min(step_s(zero, length, is_padded=is_padded) for _ in range(3))
            bar = f"at most {BAR_S} s for 24 layers" if number > 3 else ""
            kind = "padded" if is_padded else "ragged"
            print(f"{kind}  length {number}: {length:3d}  {first - again:6.2f} s  {bar}", flush=True)


if __name__ == "__main__":
    main()
