"""RoBERTa for masked-language modelling: a post-norm encoder, its head tied to the word embedding.

words + positions + token type -> norm -> dropout -> num_layers x Layer -> LMHead -> loss of the masked tokens
Layer:  norm(x + attention(x)),  then  norm(x + mlp(x))

Source: Liu et al. 2019 (arXiv:1907.11692), in the form of transformers' RobertaForMaskedLM, to which it is equal.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .parts import Embedding, Linear, LMOutput, language_model_loss


@dataclass(frozen=True)
class RobertaConfig:
    """Sizes and options of a RoBERTa."""

    vocab_size: int = 50265
    max_positions: int = 514
    """Rows of the position table; the rows up to `padding_idx` are never a token's, so 514 serve 512 tokens."""
    hidden_size: int = 768
    ffn_size: int = 3072
    num_layers: int = 12
    num_heads: int = 12
    dropout: float = 0.1
    norm_eps: float = 1e-5
    padding_idx: int = 1
    """The id of the padding token."""

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")

    @property
    def max_tokens(self) -> int:
        """The longest sequence."""
        return self.max_positions - self.padding_idx - 1


ROBERTA_PRESETS: Mapping[str, RobertaConfig] = {
    "tiny": RobertaConfig(vocab_size=128, max_positions=34, hidden_size=32, ffn_size=128, num_layers=2, num_heads=4),
    "mini": RobertaConfig(
        vocab_size=4096, max_positions=130, hidden_size=256, ffn_size=1024, num_layers=4, num_heads=4
    ),
    "small": RobertaConfig(vocab_size=16384, hidden_size=512, ffn_size=2048, num_layers=8, num_heads=8),
    "base": RobertaConfig(),
    "large": RobertaConfig(hidden_size=1024, ffn_size=4096, num_layers=24, num_heads=16),
    # The models that DeepSpeed pull request 1453 measured as "Roberta-10B" and "Roberta-50B". Known are hidden_size,
    # num_heads and ffn_size of the first, "52B" parameters and a vocabulary of about 53000 of the second. The rest is
    # what fits those counts and the reported FLOPs; the 64 heads of the second are a guess.
    "10b": RobertaConfig(hidden_size=2560, ffn_size=10240, num_layers=127, num_heads=40),
    "50b": RobertaConfig(vocab_size=53000, hidden_size=8192, ffn_size=32768, num_layers=64, num_heads=64),
}


class RobertaForMaskedLM(nn.Module):
    """RoBERTa with its masked-language-model head."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.lm_head = LMHead(config, self.embeddings.word)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> LMOutput:
        """Predicts the token at each position.

        Args:
            input_ids: `[batch, sequence]`, some of them masked.
            attention_mask: `[batch, sequence]`, 1 or True where a token may be attended to; all of them by default.
            labels: `[batch, sequence]`, the original token where it was masked, else -100.
        """
        if input_ids.shape[1] > self.config.max_tokens:
            raise ValueError(f"{input_ids.shape[1]} tokens; this model has positions for {self.config.max_tokens}")
        mask = None if attention_mask is None else attention_mask.bool()[:, None, None, :]
        x = self.embeddings(input_ids)
        for layer in self.layers:
            x = layer(x, mask)
        logits = self.lm_head(x)
        return LMOutput(None if labels is None else language_model_loss(logits, labels), logits)


class Embeddings(nn.Module):
    """Words, positions and the one token type RoBERTa has, added and normalised."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__()
        self.padding_idx = config.padding_idx
        self.word = Embedding(config.vocab_size, config.hidden_size, config.padding_idx)
        self.position = Embedding(config.max_positions, config.hidden_size, config.padding_idx)
        self.token_type = Embedding(1, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, input_ids: Tensor) -> Tensor:
        """`[batch, sequence]` to `[batch, sequence, hidden_size]`."""
        # Tokens are counted from padding_idx + 1 on; padding keeps padding_idx, whose row stays zero.
        is_token = input_ids.ne(self.padding_idx)
        positions = is_token.cumsum(dim=1) * is_token + self.padding_idx
        x = self.word(input_ids) + self.token_type(torch.zeros_like(input_ids)) + self.position(positions)
        return self.dropout(self.norm(x))


class Layer(nn.Module):
    """Attention and MLP, each added and then normalised."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.attention_norm = nn.LayerNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, config.norm_eps)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """`[batch, sequence, hidden_size]` to the same."""
        x = self.attention_norm(x + self.attention(x, mask))
        return self.mlp_norm(x + self.mlp(x))


class Attention(nn.Module):
    """Multi-head self-attention in both directions."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.num_heads = config.num_heads
        self.dropout = config.dropout
        self.q = Linear(hidden, hidden)
        self.k = Linear(hidden, hidden)
        self.v = Linear(hidden, hidden)
        self.o = Linear(hidden, hidden)
        self.output_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """`[batch, sequence, hidden_size]` to the same; mask is `[batch, 1, 1, sequence]`, True where to attend."""
        q, k, v = (self._split_heads(linear(x)) for linear in (self.q, self.k, self.v))
        dropout = self.dropout if self.training else 0.0
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return self.output_dropout(self.o(heads.transpose(1, 2).flatten(2)))

    def _split_heads(self, x: Tensor) -> Tensor:
        """`[batch, sequence, hidden_size]` to `[batch, heads, sequence, head_size]`."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class MLP(nn.Module):
    """Two linears with gelu between them."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__()
        self.up = Linear(config.hidden_size, config.ffn_size)
        self.down = Linear(config.ffn_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, sequence, hidden_size]` to the same."""
        return self.dropout(self.down(F.gelu(self.up(x))))


class LMHead(nn.Module):
    """Hidden states to logits, with the weight of the word embedding and a bias of its own."""

    def __init__(self, config: RobertaConfig, word: Embedding) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, config.norm_eps)
        self.weight = word.weight
        self.bias = nn.Parameter(torch.empty(config.vocab_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fill the bias in place; the weight is filled by the word embedding."""
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, sequence, hidden_size]` to `[batch, sequence, vocab_size]`."""
        return F.linear(self.norm(F.gelu(self.dense(x))), self.weight, self.bias)
