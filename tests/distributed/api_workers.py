"""What ranks do in test_api_ranks.py: real gloo ranks against what every rank computes by itself."""

import copy
import functools
import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.utils._python_dispatch import TorchDispatchMode

import fxzero
from fxzero.passes import default_passes
from fxzero.testing import engine_of
from tests.helpers.pairs import Net, points, sgd

Loss = Callable[[nn.Module, int], Tensor]
"""The loss of one rank; called with the module and the rank, after seeding for both."""


def _add(first: Sequence[Any], second: Sequence[Any]) -> list[Any]:
    return [a if b is None else a + b for a, b in zip(first, second, strict=True)]


class Pair:
    """A compiled net, and one plain replica for each rank; all of them share parameters, not buffers."""

    ranks_per_node: int | None = None
    """Gradients are summed over the ranks of a node, then over nodes. Default: all are one node."""

    def __init__(self, rank: int, world_size: int, build: Callable[[], nn.Module] = Net, **options: Any) -> None:
        self.rank = rank
        torch.manual_seed(0)
        self.plain = build()
        self.replicas = [copy.deepcopy(self.plain) for _ in range(world_size)]
        for replica in self.replicas:
            for mine, shared in zip(replica.parameters(), self.plain.parameters(), strict=True):
                mine.data = shared.data
        torch.manual_seed(rank)
        model = build()
        if rank == 0:
            model.load_state_dict(self.plain.state_dict())
        self.zero = fxzero.compile(model, **options)
        self.optimizers = [sgd(self.zero), sgd(self.plain)]

    def backward(self, loss: Loss, seed: int = 0) -> None:
        """One backward of both; gradients of the replicas are averaged in rank order and added to the plain model's."""
        of_ranks: list[Any] = []
        for rank, replica in enumerate(self.replicas):
            torch.manual_seed(100 * seed + rank)
            grads: Any = torch.autograd.grad(loss(replica, rank), list(replica.parameters()), allow_unused=True)
            of_ranks.append(grads)
        size = self.ranks_per_node or len(of_ranks)
        nodes = [functools.reduce(_add, of_ranks[first:][:size]) for first in range(0, len(of_ranks), size)]
        total = functools.reduce(_add, nodes)
        for param, grad in zip(self.plain.parameters(), total, strict=True):
            if grad is not None:
                mean = grad / len(self.replicas)
                param.grad = mean if param.grad is None else param.grad + mean
        torch.manual_seed(100 * seed + self.rank)
        loss(self.zero, self.rank).backward()

    def step(self) -> None:
        """An optimizer step of both, and a comparison before and after."""
        self.check()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.check()

    def check(self) -> None:
        """Shards and their gradients are slices of the plain model's, and buffers are this rank's replica's."""
        shards = engine_of(self.zero).sharded.shards
        assert shards is not None
        full = dict(self.plain.named_parameters())
        for name, param in self.zero.named_parameters():
            assert torch.equal(param, shards.cut(name, full[name].detach())), f"{name} differs"
            grad = full[name].grad
            assert (param.grad is None) == (grad is None), f"gradient of {name}"
            if grad is not None:
                assert torch.equal(param.grad, shards.cut(name, grad)), f"gradient of {name} differs"
        for (name, own), (_, other) in zip(
            self.zero.named_buffers(), self.replicas[self.rank].named_buffers(), strict=True
        ):
            assert torch.equal(own, other), f"buffer {name} differs"


def data(rank: int, seed: int) -> Tensor:
    """A batch of one rank; batches of ranks have different sizes."""
    return points(10 * seed + rank, batch=3 + rank)


def train_by_other_outputs(rank: int, world_size: int) -> None:
    """The loss, then the logits, then both, then the loss again."""
    both = Pair(rank, world_size)
    losses: list[Loss] = [
        lambda m, r: m(data(r, 0)).loss,
        lambda m, r: m(data(r, 1)).logits.abs().sum(),
        lambda m, r: (lambda out: out.loss * 2 + out.logits.exp().mean())(m(data(r, 2))),
        lambda m, r: m(data(r, 3)).loss,
    ]
    for seed, loss in enumerate(losses):
        both.backward(loss, seed)
        both.step()


def train_with_flags(rank: int, world_size: int, bucket_bytes: int) -> None:
    """Micro-batches that reach different parameters; with small buckets they have different collectives."""
    both = Pair(rank, world_size, passes=default_passes(bucket_bytes=bucket_bytes))
    for step in range(2):
        for micro, use_extra in enumerate((False, True, False)):
            seed = 3 * step + micro
            both.backward(lambda m, r, seed=seed, use=use_extra: m(data(r, seed), use).loss, seed)
        both.step()


def train_with_calls_in_between(rank: int, world_size: int) -> None:
    """Forwards without a backward, eval, and state dicts in between."""
    both = Pair(rank, world_size)
    for seed in range(2):
        torch.manual_seed(0)
        both.zero(data(rank, 5))
        for r, replica in enumerate(both.replicas):
            torch.manual_seed(0)
            replica(data(r, 5))
        both.zero.eval()
        with torch.inference_mode():
            both.zero(data(rank, 6))
        both.zero.train()
        both.backward(lambda m, r, seed=seed: m(data(r, seed), use_extra=True).loss * 2, seed)
        both.zero.state_dict()
        both.step()


class Failing(nn.Module):
    """Fails in the step where an index is too large."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 6)
        self.net = Net()

    def forward(self, ids: Tensor) -> Any:
        return self.net(self.table(ids))


def fail_and_go_on(rank: int, world_size: int, *without: str) -> None:
    """Every rank fails in the middle of its forward, with gathers in flight; then training goes on.

    Args:
        without: optimizations that the compiled net does without.
    """
    options = {"without": without} if without else {"passes": default_passes(bucket_bytes=1)}
    both = Pair(rank, world_size, Failing, **options)
    good, bad = torch.tensor([0, 1, 3, 3]), torch.tensor([0, 1, 2, 9])
    for seed in range(3):
        both.backward(lambda m, r: m(good).loss, seed)
        both.step()
        try:
            both.zero(bad)
        except IndexError:
            continue
        raise AssertionError("the index was not refused")


def clip(rank: int, world_size: int, norm_type: float) -> tuple[float, float, int]:
    """The norm, that of the plain model, and how many of this rank's shards are empty."""
    both = Pair(rank, world_size)
    both.backward(lambda m, r: m(data(r, 0), use_extra=True).loss)
    for module in (both.zero, both.plain):
        module.zero_grad()
    both.backward(lambda m, r: m(data(r, 0)).loss)
    _check_norms_of_torch(both, norm_type)
    norm = both.zero.clip_grad_norm_(0.01, norm_type)
    expected = nn.utils.clip_grad_norm_(both.plain.parameters(), 0.01, norm_type)
    shards = engine_of(both.zero).sharded.shards
    assert shards is not None
    for name, param in both.plain.named_parameters():
        own = both.zero.get_parameter(name).grad
        assert (own is None) == (param.grad is None)
        if own is not None and param.grad is not None:
            torch.testing.assert_close(own, shards.cut(name, param.grad), rtol=1e-5, atol=1e-9)
    return norm.item(), expected.item(), sum(param.numel() == 0 for param in both.zero.parameters())


def _check_norms_of_torch(both: Pair, norm_type: float) -> None:
    """Norms by name, and torch's functions on parameters and gradients of the compiled net, are those of whole ones."""
    zero, plain = both.zero, both.plain
    expected = {name: param.grad.norm(norm_type) for name, param in plain.named_parameters() if param.grad is not None}
    torch.testing.assert_close(zero.grad_norms(norm_type), expected, rtol=1e-5, atol=1e-9)
    grads = [[param.grad for param in net.parameters() if param.grad is not None] for net in (zero, plain)]
    total, whole = (nn.utils.get_total_norm([*each, torch.full((3,), 7.0)], norm_type) for each in grads)
    torch.testing.assert_close(total, whole, rtol=1e-5, atol=1e-9)
    before = [None if param.grad is None else param.grad.clone() for param in zero.parameters()]
    first = next(param for param in zero.parameters() if param.grad is not None)
    first.grad = first.grad.clone()  # of the user's own
    norm = nn.utils.clip_grad_norm_(zero.parameters(), 0.5, norm_type)
    torch.testing.assert_close(norm, nn.utils.get_total_norm(grads[1], norm_type), rtol=1e-5, atol=0)
    for param, grad in zip(zero.parameters(), before, strict=True):
        assert (param.grad is None) == (grad is None)
        if param.grad is not None and grad is not None:
            torch.testing.assert_close(param.grad, grad * (0.5 / norm).clamp(max=1.0), rtol=1e-4, atol=1e-9)
            param.grad.copy_(grad)


def refuse_late_backward(rank: int, world_size: int) -> str:
    """Also a rank all of whose shards are empty notices that the parameters changed."""
    torch.manual_seed(0)
    zero = fxzero.compile(nn.Linear(2, 2))
    optimizer = sgd(zero)
    zero(torch.ones(1, 2)).sum().backward()
    late = zero(torch.ones(1, 2)).sum()
    optimizer.step()
    try:
        late.backward()
    except fxzero.StaleBackwardError as error:
        return str(error)
    return "nothing"


def states(rank: int, world_size: int, when: str) -> list[Any]:
    """The state dict of rank 0's weights and buffers on all ranks, or on rank 0 only."""
    torch.manual_seed(rank)
    model = Net()
    model.norm.running_mean.fill_(rank)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    zero = fxzero.compile(model)
    if when == "after":
        with torch.no_grad():
            zero.eval()(points())
    full = zero.state_dict()
    alone = zero.state_dict(rank0_only=True)
    assert list(full) == list(expected)
    assert list(alone) == (list(expected) if rank == 0 else [])
    assert all(torch.equal(alone[name], full[name]) for name in alone)
    if rank == 0:
        assert all(torch.equal(full[name], value) for name, value in expected.items())
    names = [(name, full is None) for name, full in zero.iter_full_params(rank0_only=True)]
    assert all(is_none == (rank != 0) for _, is_none in names)
    torch.manual_seed(7)
    other = Net().state_dict()
    zero.load_state_dict(other)
    assert all(torch.equal(value, other[name]) for name, value in zero.state_dict().items())
    return [value.double().sum().item() for value in full.values()]


class Peak(TorchDispatchMode):
    """The largest sum of bytes of the storages that operators made inside and that live at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [arg.untyped_storage() if isinstance(arg, Tensor) else arg for arg in args]
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if type(value) is Tensor and not value.is_meta:
                storage = value.untyped_storage()
                if any(storage is each for each in given):
                    continue
                if id(storage) not in self.live:
                    weakref.finalize(storage, self.live.pop, id(storage), None)
                self.live[id(storage)] = storage.nbytes()
                self.nbytes = max(self.nbytes, sum(self.live.values()))
        return result


def measure_memory(rank: int, world_size: int) -> dict[str, float]:
    """Peaks in units of one of 8 layers, which are 8 buckets; on every rank the same weights, of rank 0's generator."""
    layer_bytes = 256 * 256 * 4

    def build() -> nn.Module:
        return nn.Sequential(*[nn.Linear(256, 256, bias=False) for _ in range(8)])

    torch.manual_seed(0)
    expected = build().state_dict()
    with torch.device("meta"):
        model = build()
    torch.manual_seed(rank)
    zero = fxzero.compile(model, passes=default_passes(bucket_bytes=layer_bytes))
    peaks: dict[str, float] = {}

    def measure(what: str, do: Callable[[], Any]) -> Any:
        with Peak() as peak:
            result = do()
        peaks[what] = peak.nbytes / layer_bytes
        return result

    measure("initialise", lambda: [None for _ in zero.iter_full_params()])
    full = measure("state_dict", zero.state_dict)
    measure("rank0_only", lambda: zero.state_dict(rank0_only=True))
    measure("load", lambda: zero.load_state_dict(full))
    assert all(torch.equal(full[name], value) for name, value in expected.items())
    with torch.device("meta"):
        other = fxzero.compile(build(), passes=default_passes(bucket_bytes=layer_bytes))
    measure("load on meta", lambda: other.load_state_dict(full))
    assert all(torch.equal(value, full[name]) for name, value in other.state_dict().items())
    return peaks


def accumulate_without_sync(rank: int, world_size: int) -> None:
    """Micro-batches under no_sync() that reach other parameters than the last one, outside; then clipping."""
    both = Pair(rank, world_size)
    for step in range(2):
        for micro, use_extra in enumerate((True, False)):
            with both.zero.no_sync():
                both.backward(lambda m, r, s=micro, use=use_extra: m(data(r, s), use).loss, 10 * step + micro)
        both.backward(lambda m, r: m(data(r, 2)).loss, 10 * step + 2)
        shards = engine_of(both.zero).sharded.shards
        assert shards is not None
        for name, param in both.plain.named_parameters():
            assert param.grad is not None
            expected = shards.cut(name, param.grad)
            torch.testing.assert_close(both.zero.get_parameter(name).grad, expected, rtol=1e-5, atol=1e-7)
        for module in (both.zero, both.plain):
            module.zero_grad()


def train_in_a_subgroup(rank: int, world_size: int, members: Sequence[int]) -> None:
    """Some ranks of the world train; rank 0 of the group is not rank 0 of the world."""
    group = dist.new_group(list(members))
    if rank in members:
        assert isinstance(group, dist.ProcessGroup)
        both = Pair(group.rank(), group.size(), process_group=group)
        for seed in range(2):
            both.backward(lambda m, r, seed=seed: m(data(r, seed)).loss, seed)
            both.step()
        assert torch.equal(both.zero.state_dict()["head.weight"], both.plain.head.weight)
    dist.barrier()


def trust_equal_seeds(rank: int, world_size: int) -> None:
    """With sync_init=False nothing is sent at the start: here rank 1 has another value, and keeps it."""
    torch.manual_seed(0)
    model = nn.Linear(64, 4, bias=False)
    full = torch.full((4, 64), float(rank))
    with torch.no_grad():
        model.weight.copy_(full)
    zero = fxzero.compile(model, sync_init=False, example=torch.ones(1, 64))
    assert (zero.weight == rank).all()
    assert zero.state_dict()["weight"].flatten().tolist() == [
        float(each) for each in range(world_size) for _ in range(256 // world_size)
    ]


def train_against_each_other(rank: int, world_size: int) -> list[float]:
    """Two compiled modules with the same names: the collectives of one are not taken for those of the other."""
    torch.manual_seed(0)
    zeros = [
        fxzero.compile(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), passes=default_passes(bucket_bytes=1))
        for _ in range(2)
    ]
    optimizers = [sgd(zero) for zero in zeros]
    generator, critic = zeros
    losses: list[float] = []
    for seed in range(3):
        fake = generator(data(rank, seed))
        gap = critic(fake.detach()).tanh().mean() - critic(data(rank, seed + 5)).tanh().mean()
        gap.backward()
        optimizers[1].step()
        optimizers[1].zero_grad()
        critic.requires_grad_(False)
        loss = critic(fake).tanh().mean()
        loss.backward()
        critic.requires_grad_(True)
        optimizers[0].step()
        optimizers[0].zero_grad()
        losses += [gap.item(), loss.item()]
    assert all(math.isfinite(loss) for loss in losses)
    return [value.sum().item() for zero in zeros for value in zero.state_dict().values()]


def scale_gradients(rank: int, world_size: int) -> list[bool]:
    """In which of three steps the parameters changed; rank 1 alone has an infinite gradient in the second."""
    torch.manual_seed(0)
    zero = fxzero.compile(Net())
    optimizer, scaler = sgd(zero), ShardedGradScaler("cpu")
    changed: list[bool] = []
    for step in range(3):
        scaler.scale(zero(points()).loss).backward()
        param = next(param for param in zero.parameters() if param.grad is not None and param.numel() > 0)
        if step == 1 and rank == 1:
            param.grad.fill_(math.inf)
        before = param.detach().clone()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        changed.append(not torch.equal(param, before))
    return changed


class Empty(nn.Module):
    """Has a parameter without elements that is alone in its bucket."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.empty = nn.Linear(6, 4), nn.Parameter(torch.empty(0, 4, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        return (self.linear(x) + self.empty.sum().float()).square().mean()


def train_with_an_empty_parameter(rank: int, world_size: int) -> None:
    """Two steps."""
    both = Pair(rank, world_size, Empty)
    for seed in range(2):
        both.backward(lambda m, r, seed=seed: m(data(r, seed)), seed)
        both.step()


def unfreeze_under_a_budget(rank: int, world_size: int) -> None:
    """A frozen layer stays gathered, until backward needs it too, for the gradient of the layer below."""
    both = Pair(
        rank, world_size, lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), memory_budget=2**24
    )
    params = [[*model.parameters()] for model in (both.zero, both.plain, *both.replicas)]
    for is_trained in (False, True):
        for own in params:
            for param in own[:2]:
                param.requires_grad_(is_trained)
        both.zero(data(rank, 0)).square().mean().backward()
    both.zero.zero_grad()
    both.backward(lambda m, r: m(data(r, 1)).square().mean(), 1)
    both.step()
