"""Parts that no tracer can follow run as they are: one step after another, they do what the plain model does."""

import contextlib
import copy
import random
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxzero
from fxzero.capture.islands.site import Site
from fxzero.errors import CaptureError, IslandError
from fxzero.host.gc_pause import gc_paused
from fxzero.testing import engine_of
from tests.helpers.island_models import WIDTH, Around, Branch, Experts, Products, points, seed_all


class Part(nn.Module):
    """A layer, a function of its result, and a branch that makes it untraceable."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.function = nn.Linear(WIDTH, WIDTH), function
        self.table = nn.Embedding(WIDTH, WIDTH, sparse=True)

    def forward(self, x: Tensor) -> Any:
        y = self.linear(x)
        return self.function(self, y if y.sum().item() < 1e9 else y * 2)


def islands_of(zero: fxzero.ZeroModule) -> list[str]:
    return sorted(engine_of(zero).maker.islands.paths)


def train_both(
    plain: nn.Module,
    steps: int = 3,
    loss: Callable[[Any], Tensor] = lambda out: out,
    other: nn.Module | None = None,
    **options: Any,
) -> fxzero.ZeroModule:
    """Train a model and its compiled copy, and compare losses, gradients that are missing, parameters and buffers.

    Args:
        other: what is compiled, of a model that cannot be copied.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        zero = fxzero.compile(copy.deepcopy(plain) if other is None else other, **options)
        optimizers = [torch.optim.SGD(each.parameters(), 0.1, 0.9, weight_decay=0.1) for each in (plain, zero)]
        for step in range(steps):
            losses: list[Tensor] = []
            for module in (plain, zero):
                seed_all(step)
                losses.append(loss(module(points(step))))
                losses[-1].backward()
            assert torch.equal(*losses)
            missing = [[fqn for fqn, p in each.named_parameters() if p.grad is None] for each in (plain, zero)]
            assert missing[0] == missing[1]
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            state = zero.state_dict()
            assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())
    return zero


def test_experts_that_no_token_chose_have_no_gradient() -> None:
    seed_all(0)
    zero = train_both(Around(Experts(16)))
    assert islands_of(zero) == ["part"]


def scripted() -> nn.Module:
    class Scripted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            if bool(y.sum() > 0):
                y = y * 2
            return y

    return torch.jit.script(Scripted())


def compiled() -> nn.Module:
    return torch.compile(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()), backend="eager")  # type: ignore[return-value]


class DrawsFromItsOwn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.generator = nn.Linear(WIDTH, WIDTH), torch.Generator().manual_seed(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * (torch.rand(x.shape, generator=self.generator) < 0.5)


@pytest.fixture
def checks_of_distributions() -> Iterator[None]:
    """torch.compile switches the checks of torch.distributions off for the whole process."""
    yield
    torch.distributions.Distribution.set_default_validate_args(True)


@pytest.mark.usefixtures("checks_of_distributions")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("part", [scripted, compiled, DrawsFromItsOwn])
def test_what_a_trace_cannot_look_into(part: Callable[[], nn.Module]) -> None:
    built: list[nn.Module] = []
    for _ in range(2):
        seed_all(0)
        built.append(Around(part()))
    assert islands_of(train_both(built[0], other=built[1])) == ["part"]


def test_a_frozen_parameter_that_an_island_makes_itself() -> None:
    seed_all(0)
    train_both(Around(Part(lambda self, y: y * nn.Parameter(torch.tensor([3.0]), requires_grad=False))))


@dataclass
class Graph:
    x: Tensor
    kind: str = "plain"


class TakesGraphs(nn.Module):
    """A part that is given an object of an own class, in a model that is given one."""

    def __init__(self) -> None:
        super().__init__()
        self.part = Part(lambda self, graph: graph.x)

    def forward(self, graph: "Graph | Tensor") -> Tensor:
        x = graph.x if isinstance(graph, Graph) else graph
        return self.part.linear(x[x[:, 0] > 0]).square().mean()


def test_a_model_that_is_one_island_is_given_an_object_of_an_own_class() -> None:
    seed_all(0)
    plain = TakesGraphs()
    with pytest.warns(UserWarning, match="whole model runs as one island"):
        zero = fxzero.compile(copy.deepcopy(plain))
        assert torch.equal(zero(Graph(points(0))), plain(Graph(points(0))))
    zero(Graph(points(1))).backward()
    plain(Graph(points(1))).backward()
    found, expected = zero.part.linear.weight.grad, plain.part.linear.weight.grad
    assert found is not None and expected is not None and torch.equal(found.flatten(), expected.flatten())


class Results(NamedTuple):
    value: Tensor
    rest: dict[str, Any]


def many(part: Any, y: Tensor) -> Any:
    rest = {
        "ids": y.argmax(-1),
        "rows": y[:2],
        "weight": part.linear.weight.t(),
        "detached": y.detach(),
        "n": 3,
        "no": None,
    }
    return Results(y, rest)


class ReadsMany(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head, self.part, self.tail = nn.Linear(WIDTH, WIDTH), Part(many), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        value, rest = self.part(torch.tanh(self.head(x)))
        y = self.tail(value) @ rest["weight"] + rest["detached"] * rest["n"]
        return y.square().mean() + rest["rows"].sum() + F.one_hot(rest["ids"], WIDTH).sum() * y.mean()


def penalty(part: Any, y: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(y.square().sum(), y, create_graph=True)
    return y + grad.square()


def test_results_of_every_kind() -> None:
    seed_all(0)
    assert islands_of(train_both(ReadsMany())) == ["part"]


class Transposes(nn.Module):
    """Images whose pixels are the tokens of an island: its input is transposed, and the gradient of that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.branch = nn.Conv2d(1, WIDTH, 3), nn.BatchNorm2d(WIDTH), Branch()

    def forward(self, x: Tensor) -> Tensor:
        images = self.norm(self.conv(x.repeat(12, 5).view(12, 1, -1, WIDTH)))
        tokens = images.flatten(2).transpose(1, 2)
        return (self.branch(tokens) + tokens * self.conv.bias).square().mean()


def test_the_gradient_of_a_transposed_input_lies_as_in_eager() -> None:
    seed_all(0)
    train_both(Transposes())


class PicksPixels(nn.Module):
    """As many rows as a mask has ones, which the model makes itself."""

    def __init__(self) -> None:
        super().__init__()
        self.pick = Picks()

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.arange(len(x)).clamp(max=1).float()
        return self.pick(x, torch.ones(len(x))).square().mean() + self.pick(x, mask).mean()


class Picks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.linear(x)[torch.nonzero(mask)[:, 0]] if mask.sum().item() else x


def test_shapes_that_follow_constants_may_leave_an_island() -> None:
    seed_all(0)
    assert islands_of(train_both(PicksPixels())) == ["pick"]


def test_gradients_of_gradients_inside() -> None:
    seed_all(0)
    train_both(Around(Part(penalty)))


class Ragged(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input[input[:, 0] > 0])


def test_a_whole_model_may_return_shapes_that_follow_values() -> None:
    seed_all(0)
    zero = train_both(Ragged(WIDTH, WIDTH), steps=4, loss=lambda out: out.square().sum())
    assert islands_of(zero) == [""]
    assert "(model)" in str(zero.schedule) and "the whole model, 100%" in str(zero.schedule)


def test_a_whole_model_warns_once() -> None:
    zero = fxzero.compile(Ragged(WIDTH, WIDTH))
    with pytest.warns(UserWarning, match="whole model runs as one island.*Masked|whole model runs as one island"):
        zero(points(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        zero(points(1))


def test_evaluation_and_inference_mode() -> None:
    seed_all(0)
    plain = Around(Branch())
    zero = train_both(plain)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert torch.equal(zero(points(7)), plain(points(7)))


class InARow(nn.Module):
    """Equal parts, one behind the other."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Branch() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = x + part(x)
        return x.square().mean()


def test_equal_islands_of_which_one_is_tried_for_all() -> None:
    seed_all(0)
    plain = InARow()
    zero = fxzero.compile(copy.deepcopy(plain))
    with torch.no_grad():
        assert torch.equal(zero(points(0)), plain(points(0)))
    assert islands_of(zero) == [f"parts.{index}" for index in range(3)]


def test_only_what_a_pattern_names_is_an_island() -> None:
    seed_all(0)
    model = Around(nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(3))))
    zero = train_both(model, islands=["part.*"])
    assert islands_of(zero) == ["part.0", "part.1", "part.2"]
    text = str(zero.schedule)
    assert text.count("island") >= 6 and "islands, of which nothing inside is planned: part.0" in text
    with pytest.raises(CaptureError, match="Replace .item"):
        fxzero.compile(Around(Branch()), islands=["tail"])(points(0))
    with pytest.raises(ValueError, match=r"'part\.\*\.x', which is the path of no module"):
        fxzero.compile(copy.deepcopy(model), islands=["part.*.x"])


def test_siblings_of_another_class_are_traced() -> None:
    seed_all(0)
    assert islands_of(train_both(Around(nn.Sequential(nn.Linear(WIDTH, WIDTH), Branch(), nn.Tanh())))) == ["part.1"]


def sparse(part: Any, y: Tensor) -> Tensor:
    return y + part.table(torch.arange(len(y)))


def writes(part: Any, y: Tensor) -> Tensor:
    with torch.no_grad():
        part.linear.weight.mul_(1.01)
    return y


def keeps_deep(part: Any, y: Tensor) -> Tensor:
    part.kept = [(y.square().mean(),)]
    return y


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (sparse, r"part cannot run as it is.*sparse_coo gradient.*sparse=False.*test_islands\.py"),
        (writes, "writes into a parameter"),
        (keeps_deep, "keeps a tensor that requires grad in attribute kept.*return it"),
    ],
)
def test_what_even_an_island_cannot_do_is_refused(function: Callable[[Any, Tensor], Tensor], why: str) -> None:
    with pytest.raises(CaptureError, match=why):
        fxzero.compile(Around(Part(function)))(points(0))


class WritesLater(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head, self.part = nn.Linear(WIDTH, WIDTH), Part(lambda part, y: y)
        self.part.forward = lambda x: x[:2] if x.sum().item() < 1e9 else x  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.head(x)
        self.part(hidden).mul_(2)
        return hidden.square().mean()


def test_a_view_of_an_input_that_is_written_later_is_no_result_of_an_island() -> None:
    seed_all(0)
    assert islands_of(train_both(WritesLater())) == [""]


def test_a_shape_that_changes_after_the_trace_is_an_error() -> None:
    class Late(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:2] * 2 if x.isnan().any().item() else x * 3

    zero = fxzero.compile(Around(Late()))
    zero(points(0)).backward()
    with pytest.raises(IslandError, match=r"island part: result 0 is torch.float32\[2, 8\]"):
        zero(points(0) * float("nan"))


def test_what_a_call_holds_is_free_after_it_without_the_garbage_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    seed_all(0)
    zero = fxzero.compile(Around(Products()))
    zero(points(0)).backward()
    handles: list[weakref.ref[Any]] = []
    run = Site.run

    def noted(self: Site, *args: Any, **kwargs: Any) -> Any:
        made = run(self, *args, **kwargs)
        handles.append(weakref.ref(made))
        return made

    monkeypatch.setattr(Site, "run", noted)
    with gc_paused():
        for seed in range(5):
            zero(points(seed))
        zero(points(0)).backward()
        assert len(handles) == 6 and all(handle() is None for handle in handles)


class Answer:
    """A plain class, as a model may return it."""

    def __init__(self, loss: Tensor, rest: dict[str, Any]) -> None:
        self.loss, self.rest, self.name = loss, rest, "answer"

    def doubled(self) -> Tensor:
        return self.loss * 2


class Answers(nn.Linear):
    def forward(self, input: Tensor) -> Any:
        y = super().forward(input)
        inner = Answer(y.sum(0), {})
        return Answer(y.square().mean(), {"inner": inner, "normal": torch.distributions.Normal(y, torch.ones_like(y))})


def test_objects_of_plain_classes_are_returned() -> None:
    def loss(answer: Answer) -> Tensor:
        assert isinstance(answer, Answer) and answer.name == "answer"
        normal = answer.rest["normal"]
        return answer.doubled() + answer.rest["inner"].loss.sum() + normal.log_prob(torch.zeros(WIDTH)).mean()

    seed_all(0)
    assert islands_of(train_both(Answers(WIDTH, WIDTH), loss=loss)) == []


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, WIDTH, dropout=0.0, batch_first=True)
        self.head, self.encoder = nn.Linear(WIDTH, WIDTH), nn.TransformerEncoder(layer, 1)

    def forward(self, x: Tensor) -> Tensor:
        pad = torch.arange(len(x))[None] > 2
        return self.encoder(self.head(x)[None], src_key_padding_mask=pad)[0, :3].square().mean()


@pytest.mark.filterwarnings("ignore:.*nested tensors.*:UserWarning")
def test_what_has_a_fast_path_in_evaluation_takes_it() -> None:
    seed_all(0)
    plain = Encoder()
    zero = train_both(plain)
    assert islands_of(zero) == []
    plain.eval()
    zero.eval()
    with torch.no_grad():
        assert torch.equal(zero(points(7)), plain(points(7)))
    assert islands_of(zero) == ["encoder"]


def keeps(part: Any, y: Tensor) -> Tensor:
    part.kept = y.square().mean()
    return y


class ReadsKept(Around):
    def forward(self, x: Tensor) -> Tensor:
        loss = super().forward(x)
        return loss + self.part.kept  # type: ignore[operator]


def test_what_a_part_keeps_is_read_in_the_island_around_it_or_refused() -> None:
    seed_all(0)
    assert islands_of(train_both(ReadsKept(Part(keeps)))) == [""]
    zero = train_both(Around(Part(keeps)))
    assert islands_of(zero) == ["part"]
    loss = zero(points(0)) + zero.part.kept
    with pytest.raises(IslandError, match="attribute kept was read outside.*return it"):
        loss.backward()


class SetsBefore(Around):
    """Sets what its part reads."""

    def forward(self, x: Tensor) -> Tensor:
        self.part.scale = float(x.shape[0])  # type: ignore[assignment]
        return super().forward(x)


class ToldBefore(nn.Module):
    scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale if x.sum().item() < 1e9 else x


class SharesAList(Around):
    """Collects what its part appends to a list of both."""

    def __init__(self) -> None:
        super().__init__(Appends())
        self.losses = self.part.losses

    def forward(self, x: Tensor) -> Tensor:
        self.losses.clear()  # type: ignore[operator]
        return super().forward(x) + sum(self.losses)  # type: ignore[arg-type]


class Appends(Branch):
    def __init__(self) -> None:
        super().__init__()
        self.losses: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.losses.append(y.square().mean())
        return y


class GivesAList(Around):
    def forward(self, x: Tensor) -> Tensor:
        found: list[Tensor] = []
        return self.tail(self.part(self.head(x), found)).square().mean() + sum(found)


class TakesAList(Branch):
    def forward(self, x: Tensor, found: list[Tensor]) -> Tensor:  # type: ignore[override]
        y = super().forward(x)
        found.append(y.square().mean())
        return y


class DrawsBefore(Around):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * (1.0 + random.random()))


class Twins(nn.Module):
    """Two results in one memory, of which one is written."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.part = nn.Linear(WIDTH, WIDTH), Part(lambda part, y: (y, y.view(-1)))

    def forward(self, x: Tensor) -> Tensor:
        y, flat = self.part(self.head(x))
        flat.mul_(2)
        return y.square().mean()


@pytest.mark.parametrize(
    "build",
    [
        lambda: SetsBefore(ToldBefore()), SharesAList, lambda: GivesAList(TakesAList()), lambda: DrawsBefore(Branch()),
        Twins,
    ],
)  # fmt: skip
def test_what_goes_past_arguments_and_results_is_as_in_eager(build: Callable[[], nn.Module]) -> None:
    seed_all(0)
    train_both(build())


class Skips(nn.Module):
    """Stochastic depth: in some steps its input is its result."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x if random.random() < 0.5 else x + self.linear(x)


def test_a_part_that_is_skipped_in_some_steps() -> None:
    seed_all(0)
    assert islands_of(train_both(Around(Skips()), steps=8)) == ["part"]


def test_a_dict_whose_class_makes_values_of_keys_is_left_as_it_is() -> None:
    class Makes(dict[str, Any]):
        def __getitem__(self, key: str) -> Any:
            return super().__getitem__(key)()

    table = Makes(tanh=nn.Tanh, relu=nn.ReLU)

    class Reads(Around):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(table["tanh"](x))

    seed_all(0)
    train_both(Reads(nn.Linear(WIDTH, WIDTH)))
    assert dict.__getitem__(table, "tanh") is nn.Tanh


def same_gradients(plain: nn.Module, zero: nn.Module) -> bool:
    pairs = zip(plain.parameters(), zero.parameters(), strict=True)
    return all(torch.equal(a.grad.flatten(), b.grad.flatten()) for a, b in pairs)  # type: ignore[union-attr]


class Largest(nn.Module):
    """Gives as many columns as an attribute says, and its name; a plain number scales it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.count, self.kind, self.temperature, self.calls = nn.Linear(WIDTH, WIDTH), 2, "a", 1.0, 0

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        y = self.linear(x) / self.temperature
        y = y if y.sum().item() < 1e9 else y * 2
        return y.topk(self.count, -1)[0], self.kind


class TakesLargest(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head, self.part = nn.Linear(WIDTH, WIDTH), Largest()

    def forward(self, x: Tensor) -> Tensor:
        y, kind = self.part(self.head(x))
        return y.square().mean() * (2 if kind == "a" else 3)


@pytest.mark.filterwarnings("ignore:part.count changes:UserWarning")
def test_an_attribute_that_results_of_an_island_follow_chooses_the_plan() -> None:
    seed_all(0)
    plain = TakesLargest()
    zero = fxzero.compile(copy.deepcopy(plain))
    changes = [("count", each) for each in (2, 3, 1, 3)] + [("kind", each) for each in "ba"]
    changes += [("temperature", 1.0 + 0.1 * step) for step in range(6)]
    for step, (name, value) in enumerate(changes):
        for module in (plain, zero):
            setattr(module.part, name, value)
            module.zero_grad()
        losses = [module(points(step)) for module in (plain, zero)]
        assert torch.equal(*losses)
        for loss in losses:
            loss.backward()
        assert same_gradients(plain, zero)
        assert plain.part.calls == zero.part.calls
    assert islands_of(zero) == ["part"]


class Checks(Branch):
    def forward(self, x: Tensor) -> Tensor:
        if x.abs().max().item() < 1e9:
            raise KeyError("no such key")
        return super().forward(x)


def test_an_error_of_the_model_is_raised_as_it_is() -> None:
    with pytest.raises(KeyError, match="no such key"):
        fxzero.compile(Around(Checks()))(points(0))


def test_hooks_on_saved_tensors_around_a_call_do_not_reach_inside() -> None:
    seed_all(0)
    plain = Around(Branch())
    zero = fxzero.compile(copy.deepcopy(plain))
    for step in range(3):
        seen: list[int] = []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda x, seen=seen: seen.append(1) or x, lambda x: x)
        losses = [plain(points(step))]
        with hooks if step == 1 else contextlib.nullcontext():
            losses.append(zero(points(step)))
        assert not seen
        for loss in losses:
            loss.backward()
        assert same_gradients(plain, zero)


def test_forwards_of_islands_may_come_before_their_backwards() -> None:
    seed_all(0)
    plain = Around(Branch())
    zero = fxzero.compile(copy.deepcopy(plain))
    for module in (plain, zero):
        losses = [module(points(step)) for step in range(3)]
        for loss in reversed(losses):
            loss.backward()
    assert same_gradients(plain, zero)


class Halves(nn.Module):
    """Binds a frozen parameter anew when everything else is done."""

    def __init__(self) -> None:
        super().__init__()
        self.trained, self.frozen = nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.trained(x) + self.frozen(x)
        self.frozen.weight = nn.Parameter(self.frozen.weight * 0.5, requires_grad=False)
        return y.sum()


def test_no_island_forgets_a_parameter_that_is_bound_last() -> None:
    with pytest.raises(CaptureError, match="binds parameter frozen.weight to another tensor"):
        fxzero.compile(Halves())(torch.ones(2, 4))
