"""The library's models, of this tree for the workers of both: a model that became faster is no faster fxzero."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.against.checkout import MODELS
from benchmarks.network.systems import Shape

_models = import_module(MODELS)


def roberta(shape: Shape) -> nn.Module:
    """With weights, unless on the meta device."""
    config = replace(_models.ROBERTA_PRESETS["small"], **_sizes(shape), ffn_size=4 * shape.hidden)
    return _models.RobertaForMaskedLM(config)


def gpt(shape: Shape) -> nn.Module:
    """With weights, unless on the meta device."""
    return _models.GPT(replace(_models.GPT_PRESETS["small"], **_sizes(shape)))


def batch_of(shape: Shape) -> dict[str, Tensor]:
    """A batch for either: random ids, which are the labels too."""
    ids = torch.randint(5, shape.vocab, (shape.batch, shape.seq))
    return {"input_ids": ids, "labels": ids}


def _sizes(shape: Shape) -> dict[str, Any]:
    return {
        "vocab_size": shape.vocab,
        "max_positions": shape.seq + 2,
        "hidden_size": shape.hidden,
        "num_heads": shape.heads,
        "num_layers": shape.layers,
        "dropout": 0.0,
    }
