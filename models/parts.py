"""What the three transformers share: Linear and Embedding with their initialisation, the output and the loss.

Every module that owns parameters or buffers has a `reset_parameters` that fills them, and only them, in place:
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
initialises a model that was built on the meta device; with the same seed, as if it had been built directly, but for
tied weights: built directly they keep what their first module drew, here what their last one did.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED_LABEL = -100
"""A position with this label does not count in the loss."""


class LMOutput(NamedTuple):
    """What a language model returns; a NamedTuple, so torch's pytree flattens it."""

    loss: Tensor | None
    """Mean cross-entropy over the labelled positions, float32, `[]`; None without labels."""
    logits: Tensor
    """`[batch, sequence, vocab_size]`."""


def language_model_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy in float32 of `[batch, sequence, vocab_size]` logits over labels that are not ignored."""
    return F.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), ignore_index=IGNORED_LABEL)


class Linear(nn.Linear):
    """nn.Linear, initialised as BERT and GPT-2 are: weight normal with deviation `std`, bias zero."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, std: float = 0.02) -> None:
        self.std = std  # before the base class, which calls reset_parameters
        super().__init__(in_features, out_features, bias)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fill weight and bias in place."""
        self.weight.normal_(std=self.std)
        if self.bias is not None:  # pyright: ignore[reportUnnecessaryComparison]
            self.bias.zero_()


class Embedding(nn.Embedding):
    """nn.Embedding, initialised as BERT and GPT-2 are: weight normal with deviation 0.02, the padding row zero."""

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fill the weight in place."""
        self.weight.normal_(std=0.02)
        if self.padding_idx is not None:
            self.weight[self.padding_idx].zero_()
