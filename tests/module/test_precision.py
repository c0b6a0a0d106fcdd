"""Precision policies on one rank: what is cast and where, copies of shards, what is refused."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy

import fxzero
from fxzero.errors import CaptureError, InputMismatchError
from fxzero.module.precision import Precision
from fxzero.planner import plan
from fxzero.testing import engine_of

BF16, FP32 = torch.bfloat16, torch.float32
POLICY = MixedPrecisionPolicy(BF16, FP32)


class Block(nn.Module):
    """A norm, a router behind a container, and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.router, self.layer = nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 4)), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        weight = self.router(h).softmax(-1).amax(-1, keepdim=True)
        return x + torch.relu(self.layer(h)) * weight.to(x.dtype)


class Net(nn.Module):
    """Two blocks and a head; returns a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, ids: Tensor) -> dict[str, Any]:
        for block in self.blocks:
            x = block(x)
        return {"logits": self.head(x), "more": [x.sum(), ids]}


def _inputs(seed: int) -> tuple[Tensor, Tensor]:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(seed)), torch.arange(3)


def test_modules_have_the_last_policy_that_matches_them_or_what_is_around_them() -> None:
    first, second, third = (MixedPrecisionPolicy(output_dtype=dtype) for dtype in (BF16, FP32, torch.float16))
    found = Precision.of({"*": first, "*.router": second, "blocks.1": third}).of_modules(Net())
    dtypes = {path: policy.output_dtype for path, policy in found.items()}
    assert dtypes[""] is dtypes["head"] is dtypes["blocks.0.norm"] is BF16
    assert dtypes["blocks.0.router"] is dtypes["blocks.0.router.0"] is FP32
    assert dtypes["blocks.1"] is dtypes["blocks.1.router.0"] is torch.float16


def test_exceptions_train_as_in_plain_pytorch() -> None:
    torch.manual_seed(0)
    model = Net()
    plain = copy.deepcopy(model)
    for block in plain.blocks:
        for module, output_dtype in ((block.norm, BF16), (block.router, FP32)):
            module.register_forward_pre_hook(lambda _, args: (args[0].float(),))
            module.register_forward_hook(lambda _, args, output, dtype=output_dtype: output.to(dtype))
    norm = MixedPrecisionPolicy(FP32, output_dtype=BF16)
    policies = {"*": MixedPrecisionPolicy(BF16, FP32, FP32), "*.norm": norm, "*.router": MixedPrecisionPolicy(FP32)}
    zero = fxzero.compile(model, mp_policy=policies)
    optimizers = [torch.optim.AdamW(module.parameters(), 0.01, foreach=False) for module in (zero, plain)]
    for step in range(3):
        x, ids = _inputs(step)
        found = zero(x, ids)
        read = {fqn: p if "norm" in fqn or "router" in fqn else p.to(BF16) for fqn, p in plain.named_parameters()}
        expected = torch.func.functional_call(plain, read, (x.to(BF16), ids))
        assert found["logits"].dtype is found["more"][0].dtype is FP32
        assert found["more"][1].dtype is torch.int64
        assert torch.equal(found["logits"], expected["logits"].float())
        for output in (found, expected):
            output["logits"].float().pow(2).sum().backward()
        for mine, theirs in zip(zero.parameters(), plain.parameters(), strict=True):
            assert mine.grad is not None and theirs.grad is not None
            assert torch.equal(mine.grad.view(-1), theirs.grad.view(-1))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def test_compute_reads_parameters_as_they_lie() -> None:
    zero = fxzero.compile(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), mp_policy=POLICY)
    zero(torch.ones(3, 8)).sum().backward()
    casts = [n for n in zero.schedule.graph.nodes if n.target is torch.ops.aten._to_copy.default]
    assert len(casts) == 1  # of the input
    memory = zero.schedule.memory.footprint.held
    assert memory.copies == memory.parameters // 2 == memory.gradients // 2 > 0
    assert "copies that compute reads" in str(zero.schedule.memory)


def test_plans_of_absent_ranks_know_the_policy() -> None:
    model, x = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)), torch.ones(3, 64)
    planned, plain = (plan(model, x, world_size=2, mp_policy=policy) for policy in (POLICY, None))
    assert planned.totals.gathered_bytes == plain.totals.gathered_bytes // 2
    held, of_plain = planned.memory.footprint.held, plain.memory.footprint.held
    assert (held.copies, held.gradients) == (of_plain.parameters // 2, of_plain.gradients)
    assert not model._forward_pre_hooks and model(x).dtype is FP32
    with pytest.raises(ValueError, match="the path of no module"):
        plan(model, x, world_size=2, mp_policy={"nothing": POLICY})


def test_inputs_stay_as_they_are_where_the_policy_says_so() -> None:
    policy = MixedPrecisionPolicy(BF16, cast_forward_inputs=False)
    zero = fxzero.compile(nn.Embedding(4, 3), mp_policy=policy)
    assert zero(torch.tensor([1])).dtype is BF16
    seen: list[torch.dtype] = []

    class Seeing(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            seen.append(input.dtype)
            return super().forward(input.to(self.weight.dtype))

    fxzero.compile(Seeing(2, 2), mp_policy=policy)(torch.ones(1, 2))
    assert set(seen) == {FP32}


def _expected(zero: fxzero.ZeroModule, x: Tensor) -> Tensor:
    state = zero.state_dict()
    assert state["weight"].dtype is FP32
    return nn.functional.linear(x.to(BF16), state["weight"].to(BF16), state["bias"].to(BF16))


def test_copies_follow_the_shards() -> None:
    zero, x = fxzero.compile(nn.Linear(4, 4), mp_policy=POLICY), torch.randn(2, 4)

    def check() -> None:
        assert torch.equal(zero(x), _expected(zero, x))

    check()
    with torch.no_grad():
        for param in zero.parameters():
            param.add_(1)
    check()
    for param in zero.parameters():
        param.data.mul_(2)
    check()
    zero.load_state_dict({"weight": torch.randn(4, 4), "bias": torch.randn(4)})
    check()
    before, data = zero(x), [param.data for param in zero.parameters()]
    for param in zero.parameters():
        param.data = param.data * 3
    assert not torch.equal(zero(x), before)
    for param, own in zip(zero.parameters(), data, strict=True):
        param.data = own
    assert torch.equal(zero(x), before)


def test_backward_reads_what_its_forward_has_read() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    zero, x = fxzero.compile(model, mp_policy=POLICY), torch.randn(2, 4)
    zero(x).sum().backward()
    expected = [param.grad.clone() for param in zero.parameters() if param.grad is not None]
    zero.zero_grad()
    loss = zero(x).sum()
    own = [param.data.clone() for param in zero.parameters()]
    for param in zero.parameters():
        param.data.mul_(5)
    with torch.no_grad():
        zero(x)  # an evaluation with other weights
    for param, data in zip(zero.parameters(), own, strict=True):
        param.data.copy_(data)
    loss.backward()
    for param, grad in zip(zero.parameters(), expected, strict=True):
        assert param.grad is not None and torch.equal(param.grad, grad)


def test_copies_are_refreshed_once_for_each_step() -> None:
    zero = fxzero.compile(nn.Linear(4, 4), mp_policy=POLICY)
    optimizer, in_flight = torch.optim.SGD(zero.parameters(), 0.1), engine_of(zero).sharded.in_flight
    for step in range(3):
        for _ in range(4):
            zero(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert in_flight.num_refreshes == step + 1


def test_islands_read_the_copies() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) if x.sum() > 0 else -self.layer(x)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), Branching())
    plain = copy.deepcopy(model)
    zero, x = fxzero.compile(model, mp_policy=POLICY), torch.randn(2, 4)
    found = zero(x)
    expected = torch.func.functional_call(plain, {k: p.to(BF16) for k, p in plain.named_parameters()}, (x.to(BF16),))
    assert "island" in str(zero.schedule) and torch.equal(found, expected)
    found.float().sum().backward()
    expected.float().sum().backward()
    for mine, theirs in zip(zero.parameters(), plain.parameters(), strict=True):
        assert mine.grad is not None and theirs.grad is not None
        assert torch.equal(mine.grad.view(-1), theirs.grad.view(-1))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.last.weight = self.first.weight


class Momentum(nn.Module):
    """Forward writes into a frozen copy."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.key.weight.mul_(0.9).add_(self.query.weight, alpha=0.1)
        return self.query(x) + self.key(x)


@pytest.mark.parametrize(
    ("policy", "error", "text"),
    [
        ({"*": POLICY, "nothing": POLICY}, ValueError, "'nothing', which is the path of no module"),
        ({"*": POLICY, "last": MixedPrecisionPolicy()}, InputMismatchError, "first.weight is .* of first and of last"),
        (BF16, TypeError, "MixedPrecisionPolicy"),
        (MixedPrecisionPolicy(torch.int8), ValueError, "param_dtype of mp_policy is torch.int8"),
        (MixedPrecisionPolicy(BF16, torch.float64), ValueError, "reduce_dtype of mp_policy is torch.float64"),
        (MixedPrecisionPolicy(output_dtype=torch.int8), ValueError, "not floating"),
    ],
)
def test_policies_that_fit_nothing_are_refused(policy: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        fxzero.compile(Tied(), mp_policy=policy)


def test_options_that_contradict_a_policy_are_refused() -> None:
    with pytest.raises(ValueError, match="without="):
        fxzero.compile(nn.Linear(2, 2), mp_policy=POLICY, without=("overlap",))
    with pytest.raises(ValueError, match="interleaved"):
        fxzero.compile(nn.Linear(2, 2), mp_policy=POLICY, layout="interleaved")


def test_a_written_parameter_must_be_left_out() -> None:
    with pytest.raises(CaptureError, match=r"key.weight.* Leave its module out"):
        fxzero.compile(Momentum(), mp_policy=POLICY)(torch.ones(2, 4))
    zero = fxzero.compile(Momentum(), mp_policy={"*": POLICY, "key": MixedPrecisionPolicy(FP32, output_dtype=BF16)})
    before = zero.state_dict()["key.weight"]
    zero(torch.ones(2, 4))
    assert not torch.equal(zero.state_dict()["key.weight"], before)


def test_a_failed_compile_gives_the_model_back_without_casts() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(InputMismatchError):
        fxzero.compile(model, mp_policy=POLICY, example=object())
    assert model(torch.ones(1, 2)).dtype is FP32
