import contextlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fxzero.graph.nodes import Role, info
from fxzero.graph.sharding import Sharding
from fxzero.graph.step import Phase
from tests.helpers.captured import check_against_eager, trace


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.b = nn.Linear(8, 8)
        self.b.weight = self.a.weight
        self.unused = nn.Linear(2, 2)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)

    def forward(self, x, scale=1.0):
        y = F.dropout(F.relu(self.norm(self.a(x)), inplace=True), 0.15) * scale
        return {"loss": self.b(self.frozen(y)).pow(2).mean(), "y": y}


class Block(nn.Module):
    """One transformer layer."""

    def __init__(self, width=16, p=0.1):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.p = p

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.p if self.training else 0.0)
        return x + F.dropout(self.out(y.transpose(1, 2).flatten(-2)), self.p, self.training)


class Decoder(nn.Module):
    def __init__(self, use_checkpoint=False, shared=False, **checkpoint_options):
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.layers = nn.ModuleList([Block(), Block()])
        if shared:
            self.layers[1] = self.layers[0]
        self.use_checkpoint = use_checkpoint
        self.options = checkpoint_options

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False, **self.options) if self.use_checkpoint else layer(x)
        return F.cross_entropy((x @ self.embed.weight.t()).flatten(0, 1), tokens.flatten())


def tokens():
    return torch.randint(0, 20, (2, 7))


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


def module_of(forward, **tensors):
    """A module with one linear layer `lin` and this forward."""

    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(4, 4)
            for name, tensor in tensors.items():
                self.register_buffer(name, tensor)

    Written.forward = forward
    return Written()


# -- numerics -------------------------------------------------------------------------------------------------------


def test_tied_frozen_and_unused_parameters_batch_norm_and_dropout():
    captured = check_against_eager(Tied(), torch.randn(4, 8), scale=2.0)
    assert captured.differentiable == (0, 1)
    assert captured.differentiated == (0,)
    assert set(captured.step.grads) == {"a.weight", "a.bias", "norm.weight", "norm.bias", "b.bias"}


@pytest.mark.parametrize("p", [0.0, 0.1, 0.15, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("kind", [nn.Dropout, nn.Dropout1d, nn.AlphaDropout, nn.FeatureAlphaDropout])
def test_dropout_draws_and_rounds_as_in_eager(p, kind):
    check_against_eager(nn.Sequential(nn.Linear(6, 6), kind(p), nn.Linear(6, 6)), torch.randn(3, 5, 6))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dropout_in_other_dtypes_and_on_transposed_tensors(dtype):
    def forward(self, x):
        y = F.dropout(self.lin(x).transpose(1, 2), 0.15)
        return F.dropout(y.transpose(0, 1), 0.3, inplace=True).sum(1)

    check_against_eager(module_of(forward).to(dtype), torch.randn(3, 5, 4, dtype=dtype))


@pytest.mark.parametrize("p", [0.0, 0.15, 0.5])
def test_attention_with_dropout(p):
    block = Block(p=p)
    check_against_eager(block, torch.randn(2, 5, 16))
    check_against_eager(block.eval(), torch.randn(2, 5, 16))


def test_other_random_operators():
    def forward(self, x):
        unused = torch.rand(3)  # still advances the generator
        y = F.rrelu(self.lin(x), training=True) + torch.randn_like(x) + torch.rand(4)
        assert unused.shape == (3,)
        return y * torch.empty(4).bernoulli_(0.3) + x.new_empty(4).normal_() + F.gumbel_softmax(y) + torch.randperm(4)

    check_against_eager(module_of(forward), torch.randn(2, 4))


def test_transformer():
    check_against_eager(Decoder(), tokens())


def test_autocast_around_the_call():
    check_against_eager(Decoder(), tokens(), ambient=autocast)
    check_against_eager(Decoder(use_checkpoint=True), tokens(), ambient=autocast)


def test_autocast_inside_the_model():
    def forward(self, x):
        with autocast():
            y = self.lin(self.lin(x))
        return self.lin(y.float()).mean()

    check_against_eager(module_of(forward), torch.randn(2, 4))


def test_autocast_cache_holds_no_fake_tensor_afterwards():
    model = nn.Linear(4, 4)
    with autocast():
        expected = model(torch.ones(1, 4))
        trace(model, torch.ones(1, 4))
        assert torch.equal(model(torch.ones(1, 4)), expected)


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, *grads):
        (x,) = ctx.saved_tensors
        return 2 * grads[0] * x.cos()


def test_custom_autograd_function():
    check_against_eager(module_of(lambda self, x: Double.apply(self.lin(x)).sum()), torch.randn(2, 4))


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor([3.0]), requires_grad=False)

    def forward(self, x):
        return x * self.factor


def test_a_set_that_only_has_another_order_is_no_change():
    names = {"temb", "args", "kwargs", "attention_mask", "hidden_states", "encoder_hidden_states", "attn"}

    def forward(self, x):
        return Double.apply(self.lin(x)).sum() * len([name for name in names if name in names])

    check_against_eager(module_of(forward), torch.randn(2, 4))


def test_a_module_that_forward_makes_and_moves_to_a_device():
    check_against_eager(module_of(lambda self, x: Scale().to(x.device)(self.lin(x)).sum()), torch.randn(2, 4))


def test_inner_autograd_grad_as_in_force_fields():
    def forward(self, x):
        energy = self.lin(x).tanh().sum()
        (force,) = torch.autograd.grad(energy, x, create_graph=True)
        return energy + force.pow(2).sum()

    check_against_eager(module_of(forward), torch.randn(2, 4, requires_grad=True))


def test_gradients_of_inputs():
    def forward(self, x, mask, y):
        return self.lin(x * mask) + y["y"]

    inputs = torch.randn(2, 4, requires_grad=True), torch.ones(2, 4), {"y": torch.randn(4, requires_grad=True)}
    captured = check_against_eager(module_of(forward), *inputs)
    assert [grad is not None for grad in captured.step.input_grads] == [True, False, True]
    assert [info(n).fqn for n in captured.step.nodes(Role.INPUT)] == ["args[0]", "args[1]", "args[2]['y']"]


def test_input_that_is_no_leaf_is_differentiated():
    outside = torch.ones(4, requires_grad=True)
    captured = trace(nn.Linear(4, 4), outside * 2)
    assert captured.step.input_grads[0] is not None


def test_expanded_and_transposed_inputs():
    check_against_eager(nn.Linear(4, 4), torch.randn(1, 4).expand(3, 4))
    check_against_eager(nn.Linear(4, 4), torch.randn(4, 3).t())


@pytest.mark.parametrize("channels_last", [False, True])
def test_convolutions(channels_last):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(True), nn.MaxPool2d(2), nn.Flatten())
    x = torch.randn(2, 3, 8, 8)
    check_against_eager(model, x.to(memory_format=torch.channels_last) if channels_last else x)
    check_against_eager(model.eval(), x)


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
@pytest.mark.parametrize("kind", [nn.GRU, nn.RNN, nn.LSTM])
def test_recurrent_layers(kind):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = kind(4, 4, num_layers=2, dropout=0.15)

        def forward(self, x):
            with torch.backends.mkldnn.flags(enabled=kind is not nn.LSTM):
                return self.rnn(x)[0].sum()

    check_against_eager(Net(), torch.randn(3, 2, 4))


# -- checkpoint -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True])
def test_checkpoint_with_dropout_recomputes_with_the_same_draws(shared):
    captured = check_against_eager(Decoder(use_checkpoint=True, shared=shared), tokens())
    draws = captured.step.graph.find_nodes(op="call_function", target=torch.ops.aten.bernoulli.p)
    assert len(draws) == 4
    phase = captured.step.phase_of()
    assert {phase[draw] for draw in draws} == {Phase.FORWARD}


def test_checkpoint_without_preserved_generator_draws_again():
    captured = check_against_eager(Decoder(use_checkpoint=True, preserve_rng_state=False), tokens())
    draws = captured.step.graph.find_nodes(op="call_function", target=torch.ops.aten.bernoulli.p)
    assert len(draws) == 8


def test_checkpoint_without_dropout():
    check_against_eager(Decoder(use_checkpoint=True).eval(), tokens())


def test_checkpoint_inside_checkpoint_with_in_place_draws():
    def inner(self, x):
        return self.lin(F.dropout1d(x, 0.3)) * torch.empty(4).uniform_()

    def outer(self, x):
        return checkpoint(lambda y: inner(self, y).sin(), self.lin(x), use_reentrant=False).cos()

    def forward(self, x):
        y = F.dropout(x, 0.5)
        y = checkpoint(lambda z: outer(self, z), y, use_reentrant=False)
        return checkpoint(lambda z: outer(self, z), y, use_reentrant=False).sum()

    check_against_eager(module_of(forward), torch.randn(2, 3, 4))


def test_checkpoint_of_batch_norm_counts_twice_as_in_eager():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU())

        def forward(self, x):
            return checkpoint(self.body, x, use_reentrant=False).sum()

    check_against_eager(Net(), torch.randn(3, 4))


def test_selective_checkpoint():
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    def policy(ctx, op, *args, **kwargs):
        save = op is torch.ops.aten.addmm.default
        return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE

    context = lambda: create_selective_checkpoint_contexts(policy)  # noqa: E731
    check_against_eager(Decoder(use_checkpoint=True, context_fn=context), tokens())


# -- buffers --------------------------------------------------------------------------------------------------------


def count_in_place(self, x):
    self.n.add_(1)
    return (self.lin(x) * self.n).sum()


def count_by_rebinding(self, x):
    before = self.n
    self.n = self.n + 1
    return {"loss": (self.lin(x) * self.n * before).sum(), "before": before, "after": self.n}


def read_before_and_after(self, x):
    y = self.lin(x) * self.n.clone()
    self.n[0].mul_(2)
    return {"loss": (y * self.n).sum(), "view": self.n[1:]}


def swap(self, x):
    self.n, self.m = self.m, self.n
    return (self.lin(x) * self.n * self.m).sum()


@pytest.mark.parametrize("forward", [count_in_place, count_by_rebinding, read_before_and_after, swap])
@pytest.mark.parametrize("with_backward", [True, False])
def test_written_buffers(forward, with_backward):
    model = module_of(forward, n=torch.tensor([2.0, 3.0, 4.0, 5.0]), m=torch.tensor([1.0, 3.0, 7.0, 5.0]))
    ambient = contextlib.nullcontext if with_backward else torch.no_grad
    check_against_eager(model, torch.randn(2, 4), ambient=ambient, steps=3)


def test_buffers_are_written_at_the_end_of_forward():
    step = check_against_eager(module_of(count_in_place, n=torch.ones(4)), torch.randn(2, 4)).step
    assert step.end_forward is not None
    assert step.end_forward.prev.target is torch.ops.aten.copy_.default


def test_tied_buffers_are_one_placeholder():
    model = module_of(count_in_place, n=torch.ones(4))
    model.other = nn.Module()
    model.other.register_buffer("same", model.get_buffer("n"))
    assert len(check_against_eager(model, torch.randn(2, 4)).step.nodes(Role.BUFFER)) == 1


def test_input_written_in_place_is_written_by_the_step():
    def forward(self, x):
        x.mul_(2)
        return self.lin(x).sum()

    model, x = module_of(forward), torch.ones(2, 4)
    step = trace(model, x).step
    (copy_,) = step.graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default)
    assert info(copy_.args[0]).role is Role.INPUT


# -- what is differentiated -------------------------------------------------------------------------------------------


@dataclass
class Result:
    hidden: torch.Tensor
    loss: torch.Tensor | None = None
    name: str = "result"


class Pair(NamedTuple):
    a: Any
    b: Any


@pytest.mark.parametrize(
    ("make", "differentiated"),
    [
        (lambda h: h, (0,)),
        (lambda h: h.sum(), (0,)),
        (lambda h: (h, h.sum()), (1,)),
        (lambda h: [h, {"x": h * 2}, None, 3, "text"], (0, 1)),
        (lambda h: Result(h, h.mean()), (1,)),
        (lambda h: Result(h), (0,)),
        (lambda h: (h.sum(), h.mean()), (0, 1)),
        (lambda h: {"loss": h.sum(), "aux": h.mean()}, (0,)),
        (lambda h: Pair(h.detach(), h), (1,)),
        (lambda h: (h, h), (0, 1)),
        (lambda h: (h.argmax(), h.sum(), torch.float32, h.shape), (1,)),
    ],
)
def test_outputs_and_what_is_differentiated(make, differentiated):
    captured = check_against_eager(module_of(lambda self, x: make(self.lin(x))), torch.randn(2, 4))
    assert captured.differentiated == differentiated
    assert len(captured.step.nodes(Role.TANGENT)) == len(differentiated)


def test_only_the_outputs_asked_for_are_differentiated():
    model = module_of(lambda self, x: (self.lin(x).sum(), self.lin(x), x.detach()))
    assert check_against_eager(model, torch.randn(2, 4), differentiated=(1,)).differentiated == (1,)
    assert check_against_eager(model, torch.randn(2, 4), differentiated=(0, 1)).differentiated == (0, 1)
    assert check_against_eager(model, torch.randn(2, 4), differentiated=(2,)).differentiated == ()


def test_outputs_that_are_placeholders_or_views_of_parameters_are_not_returned_themselves():
    model = module_of(lambda self, x: (x, self.lin.weight.t()[0], self.lin.bias, self.n), n=torch.ones(3))
    step = check_against_eager(model, torch.randn(2, 4, requires_grad=True)).step
    assert all(output.op == "call_function" for output in step.model_outputs)
    targets = [output.target for output in step.model_outputs]
    assert targets[1] is targets[2] is torch.ops.aten.clone.default


def test_hooks_of_the_tracer_are_no_observers_of_the_model():
    captured = trace(module_of(lambda self, x: (self.lin(x), self.lin.weight)), torch.randn(2, 4))
    assert not captured.state.observers and len(captured.step.model_outputs) == 2


def test_forward_only_under_no_grad_and_where_nothing_requires_grad():
    model, x = Tied(), torch.randn(4, 8)
    with torch.no_grad():
        step = trace(model, x, with_backward=False).step
    assert not step.has_backward and not step.nodes(Role.TANGENT) and not step.grads
    frozen = trace(nn.Linear(4, 4).requires_grad_(False), torch.randn(2, 4))
    assert not frozen.step.has_backward and frozen.differentiable == ()
    with torch.inference_mode():
        x = torch.randn(2, 4)
    check_against_eager(nn.Linear(4, 4), x, ambient=torch.inference_mode)


# -- the graph ------------------------------------------------------------------------------------------------------


def test_nodes_name_their_module_in_both_phases():
    for use_checkpoint in (False, True):
        step = trace(Decoder(use_checkpoint), tokens()).step
        for _, nodes in step.phases():
            names = {info(node).fqn for node in nodes}
            assert {"embed", "layers.0", "layers.0.qkv", "layers.1.out", "layers.1.norm", ""} <= names
            assert names <= {name for name, _ in Decoder().named_modules()}
    products = step.graph.find_nodes(op="call_function", target=torch.ops.aten.addmm.default)
    assert {info(node).fqn for node in products} == {f"layers.{i}.{name}" for i in (0, 1) for name in ("qkv", "out")}


def test_forward_nodes_keep_their_source_line():
    step = trace(Tied(), torch.randn(4, 8)).step
    (batch_norm,) = (n for n in step.graph.nodes if "batch_norm_legit" in str(n.target))
    assert "self.norm(self.a(x))" in batch_norm.stack_trace
    assert __file__ in batch_norm.stack_trace


def test_placeholders_are_in_order_and_cover_all_parameters():
    model = Tied()
    roles = [info(n).role for n in trace(model, torch.randn(4, 8)).step.graph.nodes if n.op == "placeholder"]
    num_params = len(list(model.parameters()))
    assert roles == [Role.PARAM] * num_params + [Role.BUFFER] * 3 + [Role.INPUT] + [Role.TANGENT]


def test_no_op_nodes_are_removed_and_every_node_has_a_value_and_a_label():
    step = trace(Decoder(use_checkpoint=True), tokens()).step
    for node in step.graph.nodes:
        if node.op == "call_function" and info(node).role is Role.COMPUTE:
            assert "val" in node.meta and "fxzero" in node.meta
            assert node.target not in (torch.ops.aten.detach.default, torch.ops.aten.alias.default)


def test_dropout_that_drops_nothing_leaves_no_clone():
    step = trace(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.0), nn.Linear(4, 4)), torch.randn(2, 4)).step
    assert not step.graph.find_nodes(op="call_function", target=torch.ops.aten.clone.default)


def test_constants_are_collected():
    captured = check_against_eager(module_of(lambda self, x: self.lin(x) + torch.tensor([1.0, 2, 3, 4])), torch.ones(4))
    assert [tensor.tolist() for tensor in captured.step.constants.values()] == [[1.0, 2.0, 3.0, 4.0]]


# -- the module -----------------------------------------------------------------------------------------------------


def test_module_on_the_meta_device_is_traced_for_the_device():
    model = Tied().to("meta")
    step = trace(model, torch.randn(4, 8)).step
    devices = {n.meta["val"].device.type for n in step.graph.nodes if n.op == "placeholder"}
    assert devices == {"cpu"}
    assert all(p.is_meta for p in model.parameters())


def test_parameters_may_be_shards_while_tracing():
    model, x = Tied(), torch.randn(4, 8)
    expected = trace(model, x).step
    from fxzero.capture import capture
    from tests.helpers.captured import param_specs

    specs = param_specs(model)
    for param in model.parameters():
        param.data = torch.empty(3)
    captured = capture(
        model, model.forward, (x,), {}, specs, device=torch.device("cpu"), sharding=Sharding(), with_backward=True
    )
    assert [str(n.target) for n in captured.step.graph.nodes] == [str(n.target) for n in expected.graph.nodes]


def test_hooks_run_and_a_disabled_forward_is_restored():
    model = nn.Linear(4, 4)
    original = model.forward

    def disabled(*args, **kwargs):
        raise AssertionError("disabled")

    model.forward = disabled
    model.register_forward_hook(lambda module, args, output: output * 2)  # pyright: ignore
    from fxzero.capture import capture
    from tests.helpers.captured import param_specs

    captured = capture(
        model,
        original,
        (torch.ones(4),),
        {},
        param_specs(model),
        device=torch.device("cpu"),
        sharding=Sharding(),
        with_backward=True,
    )
    assert model.forward is disabled
    assert captured.step.graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor)


def test_module_is_as_before_after_a_trace():
    model = Decoder(use_checkpoint=True)
    attributes = {name: dict(vars(m)) for name, m in model.named_modules()}
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    trace(model, tokens())
    assert {name: dict(vars(m)) for name, m in model.named_modules()} == attributes
    assert all(now is tensors[name] for name, now in [*model.named_parameters(), *model.named_buffers()])


def test_in_place_results_keep_the_strides_of_their_target():
    def forward(self, x):
        hidden = x + self.lin(torch.ones(4, 4))
        hidden = torch.maximum(hidden, x) + hidden.amax(-1, keepdim=True)
        shared = hidden.t()
        shared.masked_fill_(shared < 0, 0.5)
        return (torch.maximum(hidden, x) * hidden.amax(-1, keepdim=True)).square().mean()

    x = torch.randn(4, 4).t().requires_grad_()
    check_against_eager(module_of(forward), x)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("order", [(0, 2, 1), (1, 2, 0)])
def test_batch_norm_over_strided_inputs(training, order):
    class Strided(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6 if order[1] == 2 else 3)

        def forward(self, x):
            y = self.norm(self.lin(x).permute(order))
            return (y * torch.arange(y.numel()).view(y.shape)).permute(order).reshape(-1, 2).square().mean()

    check_against_eager(Strided().train(training), torch.randn(3, 4, 6))
