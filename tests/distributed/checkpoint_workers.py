"""A model and its optimizer through torch.distributed.checkpoint, in several forms, on ranks of several numbers."""

import contextlib
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard

import fxzero
from fxzero.errors import CheckpointError, RankMismatchError
from fxzero.passes import default_passes


class Net(nn.Module):
    """Tied and frozen parameters, one of one element, buffers."""

    def __init__(self, shape_of_scale: tuple[int, ...] = (1,)) -> None:
        super().__init__()
        self.table = nn.Embedding(13, 10)
        self.inner = nn.Linear(10, 10)
        self.frozen = nn.Linear(10, 3).requires_grad_(False)
        self.norm = nn.BatchNorm1d(10)
        self.head = nn.Linear(10, 13, bias=False)
        self.head.weight = self.table.weight
        self.scale = nn.Parameter(torch.full(shape_of_scale, 1.5))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.scale)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.norm(torch.relu(self.inner(self.table(ids))).flatten(0, 1)) * self.scale
        return self.head(hidden).square().mean() + self.frozen(hidden).mean()


def ids_of(step: int) -> Tensor:
    """The same batch on all ranks, so that the number of ranks does not matter."""
    return torch.randint(0, 13, (4, 5), generator=torch.Generator().manual_seed(step))


def optimizer_of(model: nn.Module, kind: str = "AdamW") -> torch.optim.Optimizer:
    params = [param for param in model.parameters() if param.requires_grad]
    groups: list[dict[str, Any]] = [{"params": params[:2], "weight_decay": 0.1}, {"params": params[2:], "lr": 3e-3}]
    if kind == "SGD":
        return torch.optim.SGD(groups, lr=1e-2, momentum=0.9)
    return getattr(torch.optim, kind)(groups, lr=1e-2)


def build(form: str, seed: int, optimizer: str = "AdamW") -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model and its optimizer: "plain", "fsdp2", or compiled in one of several ways."""
    torch.manual_seed(seed)
    with torch.device("meta") if form == "meta" else contextlib.nullcontext():
        model = Net(() if form == "scalar" else (1,))
    if form == "fsdp2":
        fully_shard(model.inner)
        fully_shard(model)
    made = optimizer_of(model, optimizer)
    if form in ("plain", "fsdp2"):
        return model, made
    options: dict[str, Any] = {} if form in ("lazy", "meta") else {"example": ids_of(0)}
    if form == "small buckets":
        options["passes"] = default_passes(bucket_bytes=300)
    return fxzero.compile(model, optimizer=made, device="cpu", **options), made


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        model(ids_of(step)).backward()
        optimizer.step()
        optimizer.zero_grad()


_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def full_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """All of it as plain tensors: on rank 0; empty elsewhere."""
    weights, state = get_state_dict(model, optimizer, options=_FULL)
    return copy.deepcopy({"model": weights, "optim": state})


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Where two nested states differ; empty if they are equal bit for bit."""
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return [f"{path}: {one.keys() ^ other.keys()}"]
        return [each for key in one for each in differences(one[key], other[key], f"{path}.{key}")]
    if isinstance(one, list | tuple):
        pairs = zip(one, other, strict=True)
        return [each for index, pair in enumerate(pairs) for each in differences(*pair, f"{path}.{index}")]
    same = torch.equal(one, other) if isinstance(one, Tensor) else one == other
    return [] if same else [path]


def save(rank: int, world_size: int, form: str, path: str, how: str) -> dict[str, Any]:
    """Train three steps and save; returns the full state."""
    model, optimizer = build(form, 0)
    train(model, optimizer, range(3))
    wanted = full_state(model, optimizer)
    if how == "stateful":
        dcp.save({"model": model, "optim": optimizer}, checkpoint_id=path)
    elif how == "raw":
        dcp.save({"model": model.state_dict(), "optim": optimizer.state_dict()}, checkpoint_id=path)
    else:
        options = StateDictOptions(flatten_optimizer_state_dict=how == "flat")
        weights, state = get_state_dict(model, optimizer, options=options)
        both = {"model": weights, "optim": state}
        if how == "async":
            group = dist.new_group(backend="gloo")
            saving: Any = dcp.async_save(both, checkpoint_id=path, process_group=group)
            train(model, optimizer, range(3, 5))
            saving.result()
        else:
            dcp.save(both, checkpoint_id=path)
    return wanted


def load(rank: int, world_size: int, form: str, path: str, how: str, wanted: dict[str, Any]) -> None:
    """Load into other weights; the state is that which was saved, and training goes on from it."""
    model, optimizer = build(form, 1)
    if how in ("stateful", "raw"):
        if how == "raw":
            train(model, optimizer, range(1))
        both: dict[str, Any] = {"model": model, "optim": optimizer}
        if how == "raw":
            both = {"model": model.state_dict(), "optim": optimizer.state_dict()}
        dcp.load(both, checkpoint_id=path)
        if how == "raw":
            model.load_state_dict(both["model"])
            optimizer.load_state_dict(both["optim"])
    else:
        options = StateDictOptions(flatten_optimizer_state_dict=how == "flat")
        weights, state = get_state_dict(model, optimizer, options=options)
        both = {"model": weights, "optim": state}
        dcp.load(both, checkpoint_id=path)
        set_state_dict(
            model, optimizer, model_state_dict=both["model"], optim_state_dict=both["optim"], options=options
        )
    found = full_state(model, optimizer)
    if rank == 0:
        assert differences(wanted, found) == []
    train(model, optimizer, range(3, 4))


def set_full(rank: int, world_size: int, how: str, wanted: dict[str, Any]) -> None:
    """Full state dicts into shards: those of all ranks, or of rank 0."""
    model, optimizer = build("lazy", 1)
    is_sent = how == "broadcast"
    options = StateDictOptions(full_state_dict=True, cpu_offload=is_sent, broadcast_from_rank0=is_sent)
    given = wanted if rank == 0 or not is_sent else {"model": {}, "optim": {}}
    set_model_state_dict(model, dict(given["model"]), options=options)
    set_optimizer_state_dict(model, optimizer, dict(given["optim"]), options=options)
    found = full_state(model, optimizer)
    if rank == 0:
        assert differences(wanted, found) == []


def asked_before_the_first_step(rank: int, world_size: int, kind: str) -> None:
    """The question changes nothing in the training after it."""
    states = list[dict[str, Any]]()
    for asks in (True, False):
        model, optimizer = build("example", 0, kind)
        if asks:
            get_optimizer_state_dict(model, optimizer)
        train(model, optimizer, range(2))
        states.append(full_state(model, optimizer))
    assert differences(*states) == []


def saved_before_the_first_step(rank: int, world_size: int, path: Path) -> None:
    """State that an optimizer does not have is either what it begins with, or refused."""
    model, optimizer = build("example", 0)
    dcp.save({"optim": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=path / "adamw")
    other, resumed = build("small buckets", 0)
    state = {"optim": get_optimizer_state_dict(other, resumed)}
    dcp.load(state, checkpoint_id=path / "adamw")
    set_optimizer_state_dict(other, resumed, state["optim"])
    for each in ((model, optimizer), (other, resumed)):
        train(*each, range(2))
    assert differences(full_state(model, optimizer), full_state(other, resumed)) == []
    model, optimizer = build("example", 0, "Rprop")
    state = get_optimizer_state_dict(model, optimizer)
    with pytest.raises(dcp.api.CheckpointException, match="is state of an optimizer that has not stepped yet"):
        dcp.save({"optim": state}, checkpoint_id=path / "rprop")


def asked_with_gradients(rank: int, world_size: int) -> None:
    model, optimizer = build("example", 0)
    model(ids_of(0)).backward()
    with pytest.raises(CheckpointError, match=r"AdamW has no state yet, but gradients: step, or call"):
        get_optimizer_state_dict(model, optimizer)
    optimizer.step()
    assert get_optimizer_state_dict(model, optimizer)["state"]


def loaded_on_rank_0_alone(rank: int, world_size: int, other_goes_on: bool) -> str:
    """Rank 0 loads a state dict that the other rank does not load; returns the error's text."""
    model, _ = build("example", 0)
    state = {name: value + 1 for name, value in Net().state_dict().items()}
    with pytest.raises((RankMismatchError, fxzero.CommunicationError)) as found:
        if rank == 0:
            model.load_state_dict(state)
        elif other_goes_on:
            model(ids_of(0))
        else:
            model.load_state_dict({}, strict=False)
    return str(found.value)


def pieces_are_refused(rank: int, world_size: int) -> None:
    model, _ = build("example", 0)
    piece: Any = get_model_state_dict(model)["inner.weight"]
    assert "Piece(inner.weight, (10, 10), [" in repr(piece)
    assert torch.equal(piece.full_tensor(), model.state_dict()["inner.weight"])
    with pytest.raises(NotImplementedError, match=r"is not defined for a piece of inner\.weight; gather it first"):
        piece.add(1)
    with pytest.raises(NotImplementedError, match="A piece has no local tensor of rows"):
        piece.to_local()
