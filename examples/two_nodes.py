"""Two nodes: gathers stay inside of a node, and only gradient shards cross the network between them.

On each of the nodes, with NODE 0 or 1 and the address of the first:

    torchrun --nnodes 2 --node-rank NODE --nproc-per-node 2 --master-addr FIRST examples/two_nodes.py
"""

import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import fxzero
from fxzero.models import GPT, GPT_PRESETS


def main() -> None:
    """Train a small GPT on random tokens."""
    if dist.is_torchelastic_launched():
        dist.init_process_group()
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    num_inside = int(os.environ["LOCAL_WORLD_SIZE"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device, (num_ranks // num_inside, num_inside), mesh_dim_names=("replicate", "shard"))

    torch.manual_seed(0)
    model = GPT(GPT_PRESETS["tiny"]).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    zero = fxzero.compile(model, optimizer=optimizer, mesh=mesh)  # across="shard": nodes share the shards instead

    generator = torch.Generator().manual_seed(rank)  # each rank has a batch of its own
    for step in range(3):
        ids = torch.randint(model.config.vocab_size, (4, 16), generator=generator).to(device)
        loss = zero(input_ids=ids, labels=ids).loss
        loss.backward()
        zero.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0:
            print(f"step {step}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
