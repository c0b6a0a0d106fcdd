import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxzero


class Turned(nn.Module):
    """Gives operators arguments whose strides differ, and views of what their backward gives."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 6), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        found = list[Tensor]()
        for function in (F.softplus, F.elu, F.hardsigmoid, F.hardtanh, F.hardswish, torch.sigmoid):
            h = function(self.inner(x).view(-1, 4, 6))  # the gradient that arrives has other strides
            found.append(self.outer(h.transpose(1, 2)).square())
        scores = self.inner(x).transpose(1, 2)
        target = self.inner(x.flip(0)).softmax(-1).detach()
        found.append(self.outer(torch.log_softmax(scores, -1)).square())
        for loss in (F.mse_loss, F.smooth_l1_loss, F.huber_loss):
            found.append(loss(scores, target.transpose(1, 2), reduction="none") * scores)
        found.append(F.binary_cross_entropy(scores.sigmoid().transpose(1, 2), target.contiguous(), reduction="none"))
        found.append(torch.xlogy(scores.sigmoid(), target.transpose(1, 2).contiguous()))
        found.append(torch.div(scores, self.inner(x).transpose(1, 2).contiguous(), rounding_mode="floor"))
        found.append(F.layer_norm(scores, (4,)))
        return torch.cat([(each * (1 + index)).reshape(-1) for index, each in enumerate(found)])


class Images(nn.Module):
    """Group norm over images whose channels lie last, as attention over pixels leaves them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.outer = nn.Linear(8, 8), nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        images = self.inner(x).transpose(1, 2).view(-1, 8, 5, 5)
        return F.silu(self.norm(self.outer(F.silu(self.norm(images)))))


@pytest.mark.parametrize(("build", "shape"), [(Turned, (2, 4, 6)), (Images, (2, 25, 8))])
def test_operators_whose_results_have_the_strides_of_one_argument(
    build: type[nn.Module], shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    plain = build()
    zero = fxzero.compile(copy.deepcopy(plain))
    x = torch.randn(shape)
    for model in (plain, zero):
        model(x).square().sum().backward()
    assert torch.equal(zero(x), plain(x))
    for param, shard in zip(plain.parameters(), zero.parameters(), strict=True):
        assert param.grad is not None and shard.grad is not None
        assert torch.equal(param.grad.flatten(), shard.grad.flatten())
