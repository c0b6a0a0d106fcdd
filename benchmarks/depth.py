"""Processor seconds of the first call against the number of layers, and how often that of the fewest layers it is.

Each call is the first one of a process of its own. Of repeated layers most are stamped; `--whole` traces all of them.
"Capture" is rehearsal, trace and stamp, which are a part of the call.

OMP_NUM_THREADS=1 python -m benchmarks.depth --family llama --layers 4 24
OMP_NUM_THREADS=1 python -m benchmarks.depth --family hf_llama --layers 4 24 1000
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

import fxzero
from benchmarks.about import heading
from fxzero.capture import capture
from fxzero.graph.sharding import Sharding
from fxzero.models import GPT, GPT_PRESETS, LLAMA_PRESETS, Llama
from fxzero.runtime.shards import spec_of

FAMILIES = ("gpt", "llama", "hf_llama")
WIDTH = 64


def model_of(family: str, num_layers: int) -> nn.Module:
    """A small model of so many layers; "hf_llama" is that of transformers."""
    if family == "gpt":
        return GPT(replace(GPT_PRESETS["tiny"], num_layers=num_layers))
    if family == "llama":
        return Llama(replace(LLAMA_PRESETS["tiny"], num_layers=num_layers))
    from transformers import LlamaConfig, LlamaForCausalLM

    config: Any = LlamaConfig(
        vocab_size=256, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=num_layers,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def loss_of(output: Any) -> torch.Tensor:
    """The loss among what a model returns."""
    if isinstance(output, torch.Tensor):
        return output
    return output["loss"] if isinstance(output, dict) else output[0]


def first_call(family: str, num_layers: int) -> float:
    """Processor seconds of the first forward and backward."""
    model, ids = model_of(family, num_layers).train(), torch.randint(0, 60, (2, 32))
    zero = fxzero.compile(model)
    began = time.process_time()
    output: Any = zero(input_ids=ids, labels=ids)
    loss_of(output).backward()
    return time.process_time() - began


def first_capture(family: str, num_layers: int, *, stamps: bool) -> float:
    """Processor seconds of the capture alone."""
    model, ids = model_of(family, num_layers).train(), torch.randint(0, 60, (2, 32))
    params = {fqn: spec_of(fqn, param) for fqn, param in model.named_parameters()}
    began = time.process_time()
    capture(
        model, model.forward, (), {"input_ids": ids, "labels": ids}, params, device=torch.device("cpu"),
        sharding=Sharding.over(1), with_backward=True, stamps=stamps,
    )  # fmt: skip
    return time.process_time() - began


def measured(what: str, family: str, num_layers: int, rounds: int) -> float:
    """The least of several runs, each in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.depth", "--one", what, "--family", family, "--layers", str(num_layers)]
    runs = (subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(rounds))
    return min(float(run.split()[-1]) for run in runs)


def main() -> None:
    """Print a table, or one number for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, default="llama")
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 24])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--whole", action="store_true", help="capture without stamping, too")
    parser.add_argument("--one", choices=("call", "capture", "whole"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    if options.one is not None:
        [layers] = options.layers
        if options.one == "call":
            print(first_call(options.family, layers))
        else:
            print(first_capture(options.family, layers, stamps=options.one == "capture"))
        return
    kinds = ("call", "capture", *(["whole"] if options.whole else []))
    rows = [[n, *(measured(kind, options.family, n, options.rounds) for kind in kinds)] for n in options.layers]
    print(heading("python -m benchmarks.depth"))
    headers = ["layers", "first call, s", *(f"{kind}, s" for kind in kinds[1:]), "ratio"]
    print(tabulate([[*row, row[1] / rows[0][1]] for row in rows], headers=headers, floatfmt=".3g"))


if __name__ == "__main__":
    main()
