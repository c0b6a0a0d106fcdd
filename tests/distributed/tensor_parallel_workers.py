"""Ranks of a mesh of data and tensor parallelism beside a model that no rank shares with another."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import fxzero
from fxzero.errors import CheckpointError, FxzeroError, InputMismatchError, OptimizerError, RankMismatchError

CLASSES, WIDTH = 26, 16


class Block(nn.Module):
    """A norm, two products, and a sum with the input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    """Two of them between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)
        self.register_buffer("scale", torch.ones(CLASSES))

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns the mean loss of the next tokens."""
        x = self.embedding(tokens[:, :-1])
        for block in self.blocks:
            x = block(x)
        logits: Any = self.head(self.norm(x)) * self.scale
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def plan(*, cuts_sequences: bool) -> dict[str, Any]:
    """The plan for a Net; activations between its products are cut along sequences, or nowhere."""
    between: Any = Shard(1) if cuts_sequences else Replicate()
    found: dict[str, Any] = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=between),
        "head": ColwiseParallel(input_layouts=between, output_layouts=Replicate()),
    }
    for path in ("blocks.0", "blocks.1"):
        found[f"{path}.up"] = ColwiseParallel(input_layouts=between)
        found[f"{path}.down"] = RowwiseParallel(output_layouts=between)
    if cuts_sequences:
        found |= {path: SequenceParallel() for path in ("norm", "blocks.0.norm", "blocks.1.norm")}
    return found


def two_dimensions(*, dp: int, tp: int) -> DeviceMesh:
    return init_device_mesh("cpu", (dp, tp), mesh_dim_names=("dp", "tp"))


def both(mesh: DeviceMesh, *, cuts_sequences: bool = True) -> tuple[Net, Net]:
    """A model of which each rank of tensor parallelism has parts, and one of equal values that is whole."""
    torch.manual_seed(torch.distributed.get_rank())  # rank 0's values win
    model = Net()
    parallelize_module(model, mesh["tp"], plan(cuts_sequences=cuts_sequences))
    torch.manual_seed(0)
    return model, Net()


def batch(step: int, rank: int) -> Tensor:
    return torch.randint(0, CLASSES, (3, 9), generator=torch.Generator().manual_seed(10 * step + rank))


def check_close(found: Any, expected: Any, what: str) -> None:
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-5, msg=lambda text: f"{what}: {text}")


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)


def train_alike(mesh: DeviceMesh, zero: Any, reference: Net, optimizers: list[Any], *, micro: int = 1) -> None:
    """Train both on the batches of all ranks, and compare losses and norms."""
    rank, num_ranks = mesh.get_local_rank("dp"), mesh["dp"].size()
    for step in range(3):
        for each in range(micro):
            if each + 1 < micro:
                with zero.no_sync():
                    loss = zero(batch(micro * step + each, rank))
                    loss.backward()
            else:
                loss = zero(batch(micro * step + each, rank))
                loss.backward()
            losses = [reference(batch(micro * step + each, other)) for other in range(num_ranks)]
            (sum(losses) / num_ranks).backward()
            check_close(loss, losses[rank], f"loss {step}")
        norms = zero.grad_norms()
        for name, param in reference.named_parameters():
            assert param.grad is not None
            check_close(norms[name], param.grad.norm(), f"norm of {name}")
        expected = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        check_close(zero.clip_grad_norm_(1e9), expected, "norm")
        check_close(torch.nn.utils.clip_grad_norm_(zero.parameters(), 0.5), expected, "norm by torch")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def train(rank: int, world_size: int, folder: str) -> str:
    """Train at 2 x 2 as the whole model; save, and go on from that, and in a plain model; the schedule."""
    mesh = two_dimensions(dp=2, tp=2)
    model, reference = both(mesh)
    optimizers: list[Any] = [adamw(model), adamw(reference)]
    zero = fxzero.compile(model, mesh=mesh["dp"], optimizer=optimizers[0], recompute="full")
    assert zero.num_parameters() == sum(param.numel() for param in reference.parameters())
    assert zero.parameter_shapes()["head.weight"] == (CLASSES, WIDTH)
    train_alike(mesh, zero, reference, optimizers)
    state = zero.state_dict()
    for name, value in reference.state_dict().items():
        check_close(state[name], value, name)
    assert bool(zero.state_dict(rank0_only=True)) == (rank == 0)
    of_model, of_optimizer = get_state_dict(zero, optimizers[0])
    dcp.save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=Path(folder))
    plain = load_into(Net(), folder)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, state[name]), name
    other, _ = both(mesh, cuts_sequences=False)
    again = load_into(fxzero.compile(other, mesh=mesh["dp"]), folder)
    for name, value in again.state_dict().items():
        assert torch.equal(value, state[name]), name
    again.load_state_dict(reference.state_dict())
    for name, value in again.state_dict().items():
        assert torch.equal(value, reference.state_dict()[name]), name
    for (name, param), own in zip(plain.named_parameters(), reference.parameters(), strict=True):
        found, expected = plain.optimizer.state[param], optimizers[1].state[own]
        check_close(found["exp_avg_sq"], expected["exp_avg_sq"], f"state of {name}")
    return str(zero.schedule)


def load_into(model: Any, folder: str) -> Any:
    """Let a model and an optimizer of it have what a checkpoint has."""
    optimizer = adamw(model)
    of_model, of_optimizer = get_state_dict(model, optimizer)
    state = {"model": of_model, "optimizer": of_optimizer}
    dcp.load(state, checkpoint_id=Path(folder))
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    model.__dict__["optimizer"] = optimizer
    return model


def train_otherwise(rank: int, world_size: int, dp: int, tp: int) -> None:
    """The same without cut sequences, under no_sync()."""
    mesh = two_dimensions(dp=dp, tp=tp)
    model, reference = both(mesh, cuts_sequences=False)
    zero = fxzero.compile(model, mesh=mesh["dp"])
    train_alike(mesh, zero, reference, [adamw(zero), adamw(reference)], micro=2)
    for name, value in reference.state_dict().items():
        check_close(zero.state_dict()[name], value, name)


def refused(rank: int, world_size: int, folder: str) -> None:
    """What is not there beside tensor parallelism says so."""
    mesh = two_dimensions(dp=1, tp=2)
    model, reference = both(mesh)
    before = list(model.parameters())
    with pytest.raises(InputMismatchError, match=r"rank [01] has another part.*mesh=mesh\[\"dp\"\]"):
        fxzero.compile(model)
    assert all(one is other for one, other in zip(before, model.parameters(), strict=True))
    stale = adamw(model)
    zero = fxzero.compile(model, mesh=mesh["dp"])
    check_close(zero(batch(0, 0)), reference(batch(0, 0)), "loss")
    zero(batch(0, 0)).backward()
    with pytest.raises(OptimizerError, match=r"in whose place fxzero.compile has put"):
        stale.step()
    matrices = [param for param in zero.parameters() if param.dim() == 2]
    with pytest.raises(OptimizerError, match=r"Muon steps whole matrices, and tensor parallelism has cut"):
        torch.optim.Muon(matrices).step()
    with pytest.raises(CheckpointError, match=r"torch.distributed.checkpoint"):
        fxzero.save(folder, zero)
    with pytest.raises(FxzeroError, match=r"a DTensor, which it is in a step alone"), zero.summon_full_params():
        pass
    other, _ = both(mesh)
    tokens = torch.zeros(3, 9 + 2 * rank, dtype=torch.int64)
    with pytest.raises(RankMismatchError, match=r"rank 1: input args\[0\]: torch.int64 \[3, 11\]"):
        fxzero.compile(other, mesh=mesh["dp"])(tokens)


class Tied(Net):
    """A head that is the embedding, and methods beside forward."""

    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.embedding.weight

    def features(self, tokens: Tensor) -> Tensor:
        """Returns a scalar."""
        return self.head(self.norm(self.blocks[1](self.embedding(tokens)))).square().mean()

    @torch.no_grad()
    def generate(self, tokens: Tensor) -> Tensor:
        """Returns logits."""
        return self.head(self.norm(self.embedding(tokens)))


def train_tied(rank: int, world_size: int) -> None:
    """Tied parameters, steps of a method, a copy, an evaluation, and a scaler that finds an infinity on one rank."""
    mesh = two_dimensions(dp=2, tp=2)
    torch.manual_seed(0)
    model, reference = Tied(), Tied()
    reference.load_state_dict(model.state_dict())
    parallelize_module(model, mesh["tp"], plan(cuts_sequences=False))
    model.head.weight = model.embedding.weight
    zero: Any = fxzero.compile(model, mesh=mesh["dp"])
    average = copy.deepcopy(zero)
    optimizers, own = [adamw(zero), adamw(reference)], mesh.get_local_rank("dp")
    for step in range(3):
        (zero(batch(step, own)) + zero.features(batch(step, own))).backward()
        for other in range(2):
            ((reference(batch(step, other)) + reference.features(batch(step, other))) / 2).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    state = zero.state_dict()
    for name, value in reference.state_dict().items():
        check_close(state[name], value, name)
    assert state["head.weight"] is state["embedding.weight"]
    average(batch(0, own))
    with pytest.raises(FxzeroError, match=r"generate.* needs .* a DTensor"):
        zero.generate(batch(0, own))
    with torch.no_grad():
        check_close(zero.eval()(batch(7, own)), reference(batch(7, own)), "evaluation")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(zero.train()(batch(8, own))).backward()
    if rank == 1:
        grads = [param.grad for param in zero.parameters() if param.numel() and param.grad is not None]
        grads[0].view(-1)[0] = float("inf")
    scaler.step(optimizers[0])
    scaler.update()
    assert scaler.get_scale() == 2.0
    for name, value in zero.state_dict().items():
        assert torch.equal(value, state[name]), name
