"""Every refusal of a capture names what, where, and the cure; and leaves the module as it was."""

import functools
import threading
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxzero.errors import CaptureError, InputMismatchError
from tests.helpers.captured import trace


def module_of(forward, **tensors):
    """A module with one linear layer `lin` and this forward."""

    class Written(nn.Module):
        held: list
        last: None
        history: list
        table: dict

        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(4, 4)
            for name, tensor in tensors.items():
                self.register_buffer(name, tensor)

    Written.forward = forward
    return Written()


def identities(module):
    """What the module and its submodules hold, by identity."""
    contents = [vars(m) for m in module.modules()]
    contents += [value for held in contents for value in held.values() if isinstance(value, dict)]
    return [{key: id(value) for key, value in held.items()} for held in contents]


def refused(module, *args, **kwargs) -> str:
    """The message; the module holds what it held before."""
    attributes = identities(module)
    tensors = [*module.parameters(), *module.buffers()]
    state = torch.get_rng_state()
    with pytest.raises(CaptureError) as raised:
        trace(module, *args, **kwargs)
    assert identities(module) == attributes
    assert all(a is b for a, b in zip(tensors, [*module.parameters(), *module.buffers()], strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    return str(raised.value)


X = torch.randn(3, 4)


def branch_on_item(self, x):
    return self.lin(x) if x.sum().item() > 0 else x


def branch_on_bool(self, x):
    if x.sum() > 0:
        return self.lin(x)
    return x


@pytest.mark.parametrize("forward", [branch_on_item, branch_on_bool])
def test_a_branch_on_a_value(forward):
    message = refused(module_of(forward), X)
    assert "aten._local_scalar_dense" in message
    assert "test_capture_errors.py:" in message and "x.sum()" in message
    assert "torch.where" in message


@pytest.mark.parametrize(
    "forward",
    [lambda self, x: self.lin(x)[x > 0], lambda self, x: x.nonzero(), lambda self, x: x.unique()],
)
def test_a_shape_that_depends_on_values(forward):
    message = refused(module_of(forward), X)
    assert "boolean mask" in message and "test_capture_errors.py:" in message


def test_tensors_on_different_devices():
    model = module_of(lambda self, x: self.lin(x) + torch.ones(4, device="meta"))
    assert "device=x.device" in refused(model, X)


def test_lstm_on_the_cpu():
    message = refused(nn.LSTM(4, 4), torch.randn(2, 3, 4))
    assert "nn.LSTM" in message and "mkldnn.flags(enabled=False)" in message


def test_a_generator_of_its_own():
    generator = torch.Generator()
    message = refused(module_of(lambda self, x: self.lin(x) + torch.rand(4, generator=generator)), X)
    assert "default generator" in message and "test_capture_errors.py:" in message


def test_seeding_in_forward():
    def forward(self, x):
        torch.manual_seed(0)
        return F.dropout(self.lin(x))

    assert "not in forward" in refused(module_of(forward), X)


def test_restoring_the_generator_in_forward():
    def forward(self, x):
        with torch.random.fork_rng():
            y = F.dropout(x)
        return F.dropout(self.lin(x)) + y

    assert "Only torch.utils.checkpoint" in refused(module_of(forward), X)


@pytest.mark.parametrize("hold", ["list", "closure"])
def test_a_parameter_read_past_its_module(hold):
    model = module_of(lambda self, x: x @ held[0])
    held = [model.lin.weight]
    if hold == "list":
        model.held = held
    message = refused(model, X)
    assert "lin.weight" in message and "x @ held[0]" in message


def test_a_tensor_that_requires_grad_from_outside():
    outside = torch.ones(4, requires_grad=True)
    assert "requires grad" in refused(module_of(lambda self, x: self.lin(x) * outside), X)


def keep(self, x):
    self.last = self.lin(x)
    return self.last.sum()


def keep_in_list(self, x):
    self.history.append(self.lin(x))
    return x.sum()


def keep_in_dict(self, x):
    self.table["x"] = self.lin(x)
    return x.sum()


def keep_as_new_buffer(self, x):
    self.register_buffer("fresh", self.lin(x))
    return x.sum()


@pytest.mark.parametrize(
    ("forward", "name"),
    [(keep, "last"), (keep_in_list, "history"), (keep_in_dict, "table"), (keep_as_new_buffer, "fresh")],
)
@pytest.mark.parametrize("then_fail", [False, True])
def test_tensors_kept_on_the_module(forward, name, then_fail):
    def failing(self, x):
        forward(self, x)
        return x.sum().item() if then_fail else x

    inner = module_of(failing)
    inner.last, inner.history, inner.table = None, [1], {"y": 2}
    if then_fail:
        refused(nn.Sequential(inner), X)
    else:
        (write,) = trace(nn.Sequential(inner), X).state.writes
        assert write.name == {"table": "0.table['x']"}.get(name, f"0.{name}")
    assert (inner.last, inner.history, inner.table) == (None, [1], {"y": 2})
    assert not hasattr(inner, "fresh")


def test_an_object_with_tensors_kept_on_the_module():
    def forward(self, x):
        self.last = SimpleNamespace(hidden=self.lin(x))
        return self.last.hidden

    assert "SimpleNamespace with tensors in last" in refused(module_of(forward), X)


def test_plain_attributes_may_change():
    def forward(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        return self.lin(x)

    model = module_of(forward)
    (write,) = trace(model, X).state.writes
    assert not hasattr(model, "calls")
    write.replay((), ())
    assert model.calls == 1


@pytest.mark.parametrize("now", [lambda n: n[:2], lambda n: n.double(), lambda n: None])
def test_a_buffer_that_changes_its_geometry(now):
    def forward(self, x):
        self.n = now(self.n)
        return self.lin(x)

    assert "buffer n" in refused(module_of(forward, n=torch.ones(4)), X)


def test_a_parameter_bound_anew():
    def forward(self, x):
        self.lin.weight = nn.Parameter(self.lin.weight * 2)
        return self.lin(x)

    assert "lin.weight" in refused(module_of(forward), X)


def test_a_parameter_written_in_place():
    def forward(self, x):
        with torch.no_grad():
            self.lin.weight.mul_(2)
        return self.lin(x)

    assert "lin.weight" in refused(module_of(forward), X)


def test_a_tensor_cached_outside_the_module():
    @functools.cache
    def mask(size):
        return torch.ones(size)

    model = module_of(lambda self, x: self.lin(x) * mask(4))
    trace(model, X)
    assert "functools.cache" in refused(model, X)


@pytest.mark.parametrize(
    "forward", [lambda self, x: self.lin(x) * x.detach().numpy().sum(), lambda self, x: self.lin(x) * x.data_ptr()]
)
def test_code_that_leaves_torch(forward):
    message = refused(module_of(forward), X)
    assert "out of PyTorch" in message and "test_capture_errors.py:" in message


def test_an_operator_without_fake_implementation():
    @torch.library.custom_op("fxzero_test::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    assert "register_fake" in refused(module_of(lambda self, x: self.lin(twice(x))), X)


def test_sparse_inputs():
    with pytest.raises(InputMismatchError, match=r"args\[0\] is a tensor of layout"):
        trace(nn.Linear(4, 4), X.to_sparse())


def test_sparse_gradients():
    model = nn.Embedding(5, 4, sparse=True)
    assert "sparse=False" in refused(model, torch.tensor([1, 2]))


def test_shapes_that_do_not_fit_name_the_line():
    def forward(self, x):
        return self.lin(x) @ torch.ones(5, 5)

    message = refused(module_of(forward), X)
    assert "torch.ones(5, 5)" in message and "plain model" in message


def test_batch_norm_without_momentum_is_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, momentum=None))
    assert "Give it a momentum: momentum=0.1" in refused(model, torch.ones(2, 4))


def test_wrong_arguments_of_forward():
    with pytest.raises(InputMismatchError, match=r"missing a required argument: 'input'"):
        trace(nn.Linear(4, 4))
    with pytest.raises(InputMismatchError, match="unexpected keyword argument 'y'"):
        trace(nn.Linear(4, 4), X, y=X)


def raises_value_error(self, x):
    raise ValueError("mine")


def raises_type_error(self, x):
    return len(3)  # pyright: ignore[reportArgumentType]


def raises_key_error(self, x):
    return {}["mine"]


@pytest.mark.parametrize(
    ("forward", "kind"),
    [(raises_value_error, ValueError), (raises_type_error, TypeError), (raises_key_error, KeyError)],
)
def test_errors_of_the_models_own_code_are_raised_unchanged(forward, kind):
    with pytest.raises(kind):
        trace(module_of(forward), X)


def test_errors_of_torchs_argument_checks_are_raised_unchanged():
    with pytest.raises(ValueError, match="dropout probability"):
        trace(module_of(lambda self, x: F.dropout(x, 2.0)), X)


def test_registered_caches_of_transformers_come_back_as_none_too():
    class Cache:
        def __init__(self, x):
            self.x = x

    Cache.__module__ = "transformers.cache_utils"
    torch.utils._pytree.register_pytree_node(Cache, lambda c: ([c.x], None), lambda xs, _: Cache(*xs))
    with pytest.warns(UserWarning, match=r"cache \(a .*Cache\)"):
        captured = trace(module_of(lambda self, x: {"loss": self.lin(x).sum(), "cache": Cache(x)}), X)
    assert captured.output.rebuild([1]) == {"loss": 1, "cache": None}


class Odd:
    pass


def test_outputs_of_other_types_come_back_as_none_with_one_warning():
    def forward(self, x):
        return {"loss": self.lin(x).sum(), "odd": Odd(), "lock": threading.Lock()}

    with pytest.warns(UserWarning, match=r"odd \(a Odd\), lock") as warned:
        captured = trace(module_of(forward), X)
    assert len(warned) == 1
    assert captured.output.rebuild([1]) == {"loss": 1, "odd": None, "lock": None}
