"""Frozen parameters that forward writes: a compiled model does what the plain one does, step for step."""

from collections.abc import Callable, Iterable
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxzero
from fxzero.errors import CaptureError, StaleBackwardError
from fxzero.testing import engine_of
from tests.helpers.pairs import as_shard, assert_same, pair, sgd


class Net(nn.Module):
    """A query encoder that is trained, a key encoder and codes that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 4))
        self.key = nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 4)).requires_grad_(False)
        self.codes = nn.Parameter(torch.randn(3, 4), requires_grad=False)
        self.count = nn.Parameter(torch.zeros(()), requires_grad=False)
        self.register_buffer("mean", torch.ones(4))
        self.momentum, self.calls = 0.9, 0
        self.write: Callable[[Any, Tensor], Any] = lambda net, x: None
        self.differentiates_key = False
        self.seen: Any = None

    @property
    def pairs(self) -> Iterable[tuple[nn.Parameter, nn.Parameter]]:
        """Parameters of the query encoder, each with that of the key encoder."""
        return zip(self.query.parameters(), self.key.parameters(), strict=True)

    def forward(self, x: Tensor) -> Tensor:
        """Returns a scalar."""
        with torch.no_grad():
            self.write(self, x)
        out = self.query(x)
        if self.differentiates_key:
            return self.key(out @ torch.ones(4, 6)).square().mean()
        return (out - self.key(x)).square().mean() + self.codes.sum() + self.count + self.mean.sum()


def _data(net: Any, x: Tensor) -> None:
    for query, key in net.pairs:
        key.data = key.data * net.momentum + query.data * (1 - net.momentum)


def _through_data(net: Any, x: Tensor) -> None:
    for query, key in net.pairs:
        key.data.mul_(net.momentum).add_(query.data, alpha=1 - net.momentum)


def _in_place(net: Any, x: Tensor) -> None:
    for query, key in net.pairs:
        key.mul_(net.momentum).add_(query, alpha=1 - net.momentum)


def _lerp(net: Any, x: Tensor) -> None:
    for query, key in net.pairs:
        key.lerp_(query, 1 - net.momentum)


def _out(net: Any, x: Tensor) -> None:
    for query, key in net.pairs:
        torch.lerp(key, query, 0.1, out=key)


def _copy(net: Any, x: Tensor) -> None:
    net.key[0].weight.data.copy_(net.query[0].weight)
    net.key[0].bias.data = net.query[0].bias.data.clone()


def _load(net: Any, x: Tensor) -> None:
    net.key.load_state_dict(net.query.state_dict())


def _foreach(net: Any, x: Tensor) -> None:
    query, key = list(net.query.parameters()), list(net.key.parameters())
    torch._foreach_mul_(key, net.momentum)
    torch._foreach_add_(key, query, alpha=1 - net.momentum)
    torch._foreach_copy_([net.codes.data], [net.codes.data + 1])


def _count(net: Any, x: Tensor) -> None:
    net.count += 1
    net.codes.data *= 1 - 1 / (net.count + 1)


def _vector(net: Any, x: Tensor) -> None:
    query, key = (nn.utils.parameters_to_vector(each.parameters()) for each in (net.query, net.key))
    nn.utils.vector_to_parameters(0.9 * key + 0.1 * query, net.key.parameters())


def _parts(net: Any, x: Tensor) -> None:
    net.codes[0] = 3.0
    net.codes.data[1, 2:] = 1.0
    net.codes.data.t()[0].add_(1)
    net.key[0].bias.zero_()


def _normalize(net: Any, x: Tensor) -> None:
    net.codes.copy_(F.normalize(net.codes * 1.1, dim=1))


def _from_the_batch(net: Any, x: Tensor) -> None:
    net.codes.data.mul_(0.9).add_(x[:3, :4] + torch.randn(3, 4) + net.mean, alpha=0.1)


def _set_and_put_back(net: Any, x: Tensor) -> None:
    before = net.key[0].weight.data
    net.key[0].weight.data = net.query[0].weight.data * 2
    net.seen = net.key(x).mean()
    net.key[0].weight.data = before


def _reads_the_old_data(net: Any, x: Tensor) -> None:
    weight = net.key[0].weight
    before = weight.data
    weight.mul_(0.7)
    weight.data = before * 0.5
    weight.data.add_(before, alpha=0.1)
    net.seen = (before + weight).sum()


def _every_second(net: Any, x: Tensor) -> None:
    net.calls += 1
    if net.calls % 2 == 0:
        _through_data(net, x)


def _schedule(net: Any, x: Tensor) -> None:
    net.momentum *= 0.99
    _through_data(net, x)


def _buffer(net: Any, x: Tensor) -> None:
    net.mean.data = net.mean.data * 0.5 + 1


WRITES = [
    *(_data, _through_data, _in_place, _lerp, _out, _copy, _load, _foreach, _count, _vector, _parts, _normalize),
    *(_from_the_batch, _set_and_put_back, _reads_the_old_data, _every_second, _schedule, _buffer),
]


def net(write: Callable[[Any, Tensor], Any]) -> Net:
    """A model that writes so."""
    torch.manual_seed(0)
    model = Net()
    model.write = write
    return model


def points(seed: int) -> Tensor:
    """A batch."""
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))


def run_backwards(zero: fxzero.ZeroModule, plain: nn.Module) -> None:
    """Three forwards and backwards of both, after each of which they are the same."""
    for step in range(3):
        for module in (zero, plain):
            module(points(step)).backward()
        assert_same(zero, plain)


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__.removeprefix("_"))
def test_each_way_to_write(write: Callable[[Any, Tensor], Any]) -> None:
    zero, plain = pair(net(write))
    optimizers = [sgd(module) for module in (zero, plain)]
    for step, grad_mode in enumerate((torch.enable_grad, torch.no_grad, torch.enable_grad, torch.inference_mode)):
        outputs: list[Tensor] = []
        for module in (zero, plain):
            torch.manual_seed(step)
            with grad_mode():
                outputs += [module(points(step)), module(points(step + 10))]
        assert torch.equal(outputs[0], outputs[2]) and torch.equal(outputs[1], outputs[3])
        assert plain.seen is None or torch.equal(zero.seen, plain.seen)
        if grad_mode is torch.enable_grad:
            for output in outputs:
                output.backward()
            for optimizer in optimizers:
                optimizer.step()
        assert_same(zero, plain)
        for optimizer in optimizers:
            optimizer.zero_grad()


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("write", [_data, _through_data, _copy])
def test_a_backward_through_the_new_value(
    write: Callable[[Any, Tensor], Any], recompute: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FXZERO_CHECK", "1")
    model = net(write)
    model.differentiates_key = True
    zero, plain = pair(model, recompute=recompute)
    run_backwards(zero, plain)


def test_a_backward_whose_values_a_later_forward_wrote_is_refused() -> None:
    model = net(_through_data)
    model.differentiates_key = True
    zero = fxzero.compile(model)
    first, second = zero(points(0)), zero(points(1))
    with pytest.raises(StaleBackwardError, match=r"A later forward has written key\.0\.weight"):
        first.backward()
    second.backward()


class Heads(Net):
    """Returns three losses."""

    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            self.write(self, x)
        out = self.query(x) - self.key(x)
        return out.square().mean(), out.sum(), self.query[0](x).sum()


def test_a_forward_that_runs_again_writes_once() -> None:
    torch.manual_seed(0)
    model = Heads()
    model.write = _through_data
    zero, plain = pair(model)
    for step in range(6):
        for module in (zero, plain):
            first, second = module(points(step)), module(points(step + 1))
            first[step % 3].backward()
            second[(step + 1) % 3].backward()
        assert_same(zero, plain)


@pytest.mark.parametrize("write", [_data, _through_data, lambda net, x: net.mean.mul_(0.9).add_(x.mean(), alpha=0.1)])
def test_a_hook_of_forward_that_writes_does_so_once(write: Callable[[Any, Tensor], Any]) -> None:
    def hook(module: nn.Module, args: tuple[Tensor]) -> None:
        write(module, *args)

    model = Net()
    model.register_forward_pre_hook(hook)
    zero, plain = pair(model)
    run_backwards(zero, plain)


def test_a_hook_of_backward_that_writes_a_buffer_does_so_once() -> None:
    model = net(lambda net, x: None)
    last: Any = model.query[2]
    last.register_buffer("size", torch.zeros(()))

    def hook(module: Any, grads: tuple[Tensor], grads_of_outputs: tuple[Tensor]) -> None:
        module.size.add_(grads_of_outputs[0].square().mean())

    last.register_full_backward_hook(hook)
    zero, plain = pair(model)
    run_backwards(zero, plain)


class WritesBehind(Net):
    """Uses parameters before it writes them, and returns them."""

    def forward(self, x: Tensor) -> Any:
        loss, before, codes = super().forward(x), self.codes.clone(), self.codes
        with torch.no_grad():
            _through_data(self, x)
            self.codes.mul_(0.5)
        return {"loss": loss, "before": before, "codes": codes, "data": self.codes.data, "view": codes.t()}


def test_values_before_and_behind_a_write() -> None:
    torch.manual_seed(0)
    zero, plain = pair(WritesBehind())
    for step in range(3):
        own, other = zero(points(step)), plain(points(step))
        assert all(torch.equal(own[key], other[key]) for key in other)
        for output in (own, other):
            output["loss"].backward()
        assert_same(zero, plain)


def test_a_tied_parameter_changes_under_both_names() -> None:
    model = net(_through_data)
    cast(Any, model).tied = nn.Linear(6, 5)
    cast(Any, model).tied.weight = model.key[0].weight

    def write(net: Any, x: Tensor) -> None:
        net.tied.weight.data.add_(net.query[0].weight)
        net.seen = net.key[0](x).sum()

    model.write = write
    zero, plain = pair(model)
    for step in range(2):
        for module in (zero, plain):
            module(points(step))
        assert torch.equal(zero.seen, plain.seen)
        assert_same(zero, plain)


def test_a_parameter_that_is_frozen_later() -> None:
    model = net(lambda net, x: None if net.key[0].weight.requires_grad else _through_data(net, x))
    model.key.requires_grad_(True)
    zero, plain = pair(model)
    optimizers = [sgd(module) for module in (zero, plain)]
    for step in range(6):
        for module, optimizer in zip((zero, plain), optimizers, strict=True):
            cast(nn.Module, module.key).requires_grad_(step % 3 == 0)
            module(points(step)).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert_same(zero, plain)


def test_a_write_goes_to_data_that_is_in_the_place_of_shards() -> None:
    zero, plain = pair(net(_through_data), example=points(0))
    written: list[dict[str, Tensor]] = []
    for module in (zero, plain):
        backup = {name: param.data for name, param in module.named_parameters()}
        for param in module.parameters():
            param.data = param.data * 0.5
        with torch.no_grad():
            module(points(1))
            module(points(2))
        written.append({name: param.data.clone() for name, param in module.named_parameters()})
        for name, param in module.named_parameters():
            param.data = backup[name]
        module(points(3)).backward()
    assert all(torch.equal(written[0][name], as_shard(full)) for name, full in written[1].items())
    assert_same(zero, plain)


def test_it_is_seen_in_the_graph() -> None:
    zero = fxzero.compile(net(_data))
    zero(points(0))
    step = engine_of(zero).last.step  # type: ignore[union-attr]
    assert step.written == tuple(f"key.{name}" for name in ("0.weight", "0.bias", "2.weight", "2.bias"))
    assert [value.meta["val"].shape for value in step.new_values.values()] == [(5, 6), (5,), (4, 5), (4,)]


# -- what is refused -------------------------------------------------------------------------------------------------


def _trained(net: Any, x: Tensor) -> None:
    net.query[0].weight.mul_(0.9)


def _trained_data(net: Any, x: Tensor) -> None:
    net.query[0].weight.data = net.query[0].weight.data * 0.9


def _shares(net: Any, x: Tensor) -> None:
    net.key[0].weight.data = net.query[0].weight.data


def _shares_with_an_input(net: Any, x: Tensor) -> None:
    net.codes.data = x.view(-1)[:12].view(3, 4)


def _other_shape(net: Any, x: Tensor) -> None:
    net.codes.data = torch.zeros(2, 4)


def _new_parameter(net: Any, x: Tensor) -> None:
    net.key[0].weight = nn.Parameter(net.key[0].weight * 0.5, requires_grad=False)


def _another_name(net: Any, x: Tensor) -> None:
    net.alias = net.codes


def _requires_grad(net: Any, x: Tensor) -> None:
    with torch.enable_grad():
        net.key[0].weight.mul_(0.9).add_(net.query[0].weight)


@pytest.mark.parametrize(
    ("write", "error"),
    [
        (_trained, r"writes into parameter query\.0\.weight, which is trained"),
        (_trained_data, r"writes into parameter query\.0\.weight, which is trained"),
        (_shares, r"sets key\.0\.weight\.data to the memory of query\.0\.weight.*\.clone\(\)"),
        (_shares_with_an_input, r"sets codes\.data to the memory of an input"),
        (_other_shape, r"sets codes\.data, which is torch\.float32\[3, 4\].*, to torch\.float32\[2, 4\]"),
        (_new_parameter, r"binds parameter key\.0\.weight to another tensor"),
        (_another_name, "gives parameter codes another name, alias"),
        (_requires_grad, r"writes into parameter key\.0\.weight a value that requires grad.*no_grad"),
    ],
)
def test_other_writes_are_refused_by_name(write: Callable[[Any, Tensor], Any], error: str) -> None:
    model = net(write)
    zero = fxzero.compile(model)
    names = list(dict(model.named_parameters()))
    for _ in range(2):
        with pytest.raises(CaptureError, match=error):
            zero(points(0))
    assert list(dict(model.named_parameters())) == names
    model.write = lambda net, x: None
    zero(points(0)).backward()


class Checkpointed(Net):
    """Writes in a checkpoint, which runs again in backward."""

    def forward(self, x: Tensor) -> Any:
        return checkpoint(super().forward, x, use_reentrant=False)


@pytest.mark.parametrize("write", [_data, _through_data])
def test_a_write_in_a_checkpoint_is_refused(write: Callable[[Any, Tensor], Any]) -> None:
    model = Checkpointed()
    model.write = write
    zero = fxzero.compile(model)
    with pytest.raises(CaptureError, match=r"The backward (sets|writes into parameter) key\.0\.weight.*checkpoint"):
        zero(points(0))


class ReadsBefore(Net):
    """Differentiates through a parameter, and sets its data then."""

    def forward(self, x: Tensor) -> Any:
        out = self.key(self.query(x) @ torch.ones(4, 6)).square().mean()
        _data(self, x)
        return out


def test_a_backward_that_reads_the_old_value_is_refused() -> None:
    zero = fxzero.compile(ReadsBefore())
    with pytest.raises(CaptureError, match=r"reads parameter key\.[02]\.weight as it was before the forward wrote it"):
        zero(points(0))
    with torch.no_grad():
        zero(points(0))
