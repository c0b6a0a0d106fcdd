"""GPT-2: a pre-norm decoder with learned positions and, as in the original, the head tied to the token embedding.

tokens + positions -> dropout -> num_layers x Layer -> norm -> head -> next-token loss
Layer:  x + attention(norm(x)),  then  x + mlp(norm(x))

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; q, k and v are separate linears.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .parts import IGNORED_LABEL, Embedding, Linear, LMOutput, language_model_loss


@dataclass(frozen=True)
class GPTConfig:
    """Sizes and options of a GPT."""

    vocab_size: int = 50257
    max_positions: int = 1024
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    dropout: float = 0.1
    norm_eps: float = 1e-5
    tied: bool = True
    """The head uses the weight of the token embedding."""

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")


GPT_PRESETS: Mapping[str, GPTConfig] = {
    "tiny": GPTConfig(vocab_size=128, max_positions=32, hidden_size=32, num_layers=2, num_heads=4),
    "mini": GPTConfig(vocab_size=4096, max_positions=256, hidden_size=256, num_layers=4, num_heads=4),
    "small": GPTConfig(),
    "medium": GPTConfig(hidden_size=1024, num_layers=24, num_heads=16),
    "large": GPTConfig(hidden_size=1280, num_layers=36, num_heads=20),
    "xl": GPTConfig(hidden_size=1600, num_layers=48, num_heads=25),
}


class GPT(nn.Module):
    """GPT-2 with its language-model head."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = Embedding(config.max_positions, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.hidden_size, config.norm_eps)
        self.head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.token_embedding.weight

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> LMOutput:
        """Predicts each next token.

        Args:
            input_ids: `[batch, sequence]`.
            labels: `[batch, sequence]`, usually `input_ids` itself, shifted in here; -100 is ignored.
        """
        length = input_ids.shape[1]
        if length > self.config.max_positions:
            raise ValueError(f"{length} tokens; this model has {self.config.max_positions} positions")
        positions = torch.arange(length, device=input_ids.device)
        x = self.dropout(self.token_embedding(input_ids) + self.position_embedding(positions))
        for layer in self.layers:
            x = layer(x)
        logits = self.head(self.norm(x))
        if labels is None:
            return LMOutput(None, logits)
        next_labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)
        return LMOutput(language_model_loss(logits, next_labels), logits)


class Layer(nn.Module):
    """Attention and MLP, each normalised before and added after."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, sequence, hidden_size]` to the same."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.num_heads = config.num_heads
        self.dropout = config.dropout
        self.q = Linear(hidden, hidden)
        self.k = Linear(hidden, hidden)
        self.v = Linear(hidden, hidden)
        self.o = Linear(hidden, hidden, std=_residual_std(config))
        self.output_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, sequence, hidden_size]` to the same."""
        q, k, v = (self._split_heads(linear(x)) for linear in (self.q, self.k, self.v))
        dropout = self.dropout if self.training else 0.0
        heads = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return self.output_dropout(self.o(heads.transpose(1, 2).flatten(2)))

    def _split_heads(self, x: Tensor) -> Tensor:
        """`[batch, sequence, hidden_size]` to `[batch, heads, sequence, head_size]`."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class MLP(nn.Module):
    """Two linears with the tanh form of gelu between them."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up = Linear(config.hidden_size, 4 * config.hidden_size)
        self.down = Linear(4 * config.hidden_size, config.hidden_size, std=_residual_std(config))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, sequence, hidden_size]` to the same."""
        return self.dropout(self.down(F.gelu(self.up(x), approximate="tanh")))


def _residual_std(config: GPTConfig) -> float:
    """GPT-2 starts what is added to the residual smaller, the more layers add to it."""
    return 0.02 / math.sqrt(2 * config.num_layers)
