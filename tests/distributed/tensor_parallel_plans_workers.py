"""Plans of tensor parallelism that prepare inputs and outputs of parts, on meshes of two and three dimensions."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import fxzero
from tests.distributed.tensor_parallel_workers import CLASSES, WIDTH, adamw, batch, check_close, load_into

BF16 = MixedPrecisionPolicy(torch.bfloat16, torch.float32)


class Attention(nn.Module):
    """Causal attention with as many heads as there are here."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        heads = [each(x).unflatten(-1, (-1, 4)).transpose(1, 2) for each in (self.q, self.k, self.v)]
        y = nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        return self.o(y.transpose(1, 2).flatten(2))


class Gated(nn.Module):
    """Three products."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(WIDTH, 24), nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Net(nn.Module):
    """A block of both between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, WIDTH)
        self.attention_norm, self.attention = nn.RMSNorm(WIDTH), Attention()
        self.mlp_norm, self.mlp = nn.LayerNorm(WIDTH), Gated()
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, CLASSES, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns the mean loss of the next tokens."""
        x = self.embedding(tokens[:, :-1])
        x = x + self.attention(self.attention_norm(x))
        x = x + self.mlp(self.mlp_norm(x))
        logits = self.head(self.norm(x))
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def plan(name: str) -> dict[str, Any]:
    """The plan that torchtitan has for Llama ("sequences"), or one whose parts return whole tensors ("outputs")."""
    found: dict[str, Any] = {f"attention.{each}": ColwiseParallel() for each in "qkv"}
    found |= {"mlp.up": ColwiseParallel(), "mlp.gate": ColwiseParallel()}
    if name == "sequences":
        whole = PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))
        return found | {
            "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
            **{path: SequenceParallel() for path in ("attention_norm", "mlp_norm", "norm")},
            **dict.fromkeys(("attention", "mlp"), whole),
            **dict.fromkeys(("attention.o", "mlp.down"), RowwiseParallel(output_layouts=Shard(1))),
            "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
        }
    return found | {
        "embedding": ColwiseParallel(output_layouts=Replicate()),
        "attention.o": RowwiseParallel(),
        "mlp.down": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
        "mlp": PrepareModuleOutput(output_layouts=Shard(1), desired_output_layouts=Replicate()),
        "head": ColwiseParallel(output_layouts=Replicate()),
    }


def losses(
    rank: int, world_size: int, name: str, sizes: dict[str, int], options: dict[str, Any], folder: str, resumes: bool
) -> None:
    """Train the cut model beside the whole one, with clipped gradients; save, or go on from what was saved.

    Args:
        sizes: the dimensions of the mesh; the last is that of tensor parallelism.
        options: of compile.
    """
    mesh = init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    *data, _ = sizes
    torch.manual_seed(0)
    model, reference = Net(), Net()
    reference.load_state_dict(model.state_dict())
    parallelize_module(model, mesh["tp"], plan(name))
    zero: Any = fxzero.compile(model, mesh=mesh[tuple(data)] if len(data) > 1 else mesh[data[0]], **options)
    optimizers: list[Any] = [adamw(each) for each in (zero, reference)]
    if resumes:
        zero, reference = load_into(zero, folder), load_into(reference, folder)
        optimizers = [zero.optimizer, reference.optimizer]
    num_rows, row = world_size // sizes["tp"], rank // sizes["tp"]
    is_exact = "mp_policy" not in options
    for step in range(3):
        found = zero(batch(step, row))
        expected = [reference(batch(step, other)) for other in range(num_rows)]
        found.backward()
        (sum(expected) / num_rows).backward()
        if is_exact:
            check_close(found, expected[row], f"loss {step}")
        torch.testing.assert_close(found, expected[row], rtol=0.02, atol=0.0)
        norms = [torch.nn.utils.clip_grad_norm_(each.parameters(), 0.1) for each in (zero, reference)]
        torch.testing.assert_close(*norms, rtol=1e-4 if is_exact else 0.02, atol=0.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    if not resumes:
        of_model, of_optimizer = get_state_dict(zero, optimizers[0])
        dcp.save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=Path(folder))
