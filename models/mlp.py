"""A multi-layer perceptron with the things that trip up tracers: batch norm, dropout, tied weights.

layers.0 .. layers.n-2:  linear -> [batch norm] -> gelu -> [dropout]
layers.n-1:              linear
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class MLPConfig:
    """Sizes and options of an MLP."""

    in_features: int = 16
    hidden_features: int = 32
    out_features: int = 8
    num_layers: int = 3
    bias: bool = True
    batch_norm: bool = False
    dropout: float = 0.0
    tied: bool = False
    """The last layer uses the weight of the first; all three widths must then be the same."""

    def __post_init__(self) -> None:
        if self.num_layers < 2:
            raise ValueError(f"num_layers is {self.num_layers}; an MLP has 2 or more")
        widths = {self.in_features, self.hidden_features, self.out_features}
        if self.tied and len(widths) > 1:
            raise ValueError(f"tied needs one width for in, hidden and out features, not {sorted(widths)}")


MLP_PRESETS: Mapping[str, MLPConfig] = {
    "tiny": MLPConfig(),
    # No size divides by 2, 3 or 4: shards of such parameters need padding.
    "odd": MLPConfig(in_features=7, hidden_features=13, out_features=5, num_layers=4),
    "tied": MLPConfig(16, 16, 16, num_layers=4, batch_norm=True, dropout=0.1, tied=True),
}


class MLP(nn.Module):
    """Maps `[batch, in_features]` to `[batch, out_features]`."""

    def __init__(self, config: MLPConfig) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden_features
        first = Layer(config.in_features, hidden, config)
        middle = [Layer(hidden, hidden, config) for _ in range(config.num_layers - 2)]
        last = nn.Linear(hidden, config.out_features, config.bias)
        self.layers = nn.Sequential(first, *middle, last)
        if config.tied:
            last.weight = first.linear.weight

    def forward(self, x: Tensor) -> Tensor:
        """Returns `[batch, out_features]`."""
        return self.layers(x)


class Layer(nn.Module):
    """Linear, batch norm where asked for, gelu, dropout."""

    def __init__(self, in_features: int, out_features: int, config: MLPConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, config.bias)
        self.norm = nn.BatchNorm1d(out_features) if config.batch_norm else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Returns `[batch, out_features]`."""
        return self.dropout(F.gelu(self.norm(self.linear(x))))
