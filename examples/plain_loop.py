"""A plain training loop: alone, or on several ranks by `torchrun --nproc-per-node 2 examples/plain_loop.py`."""

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import fxzero
from fxzero.models import GPT, GPT_PRESETS


def main() -> None:
    """Train a small GPT on random tokens."""
    if dist.is_torchelastic_launched():
        dist.init_process_group()  # NCCL on GPUs, gloo on CPUs
    num_ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)

    torch.manual_seed(0)
    with torch.device("meta"):  # no rank ever holds the whole model
        model = GPT(GPT_PRESETS["tiny"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    zero = fxzero.compile(model, optimizer=optimizer)

    tokens = TensorDataset(torch.randint(model.config.vocab_size, (32, 16)))
    sampler = DistributedSampler(tokens, num_replicas=num_ranks, rank=rank)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for (ids,) in DataLoader(tokens, batch_size=4, sampler=sampler, drop_last=True):
            loss = zero(input_ids=ids, labels=ids).loss
            loss.backward()
            zero.clip_grad_norm_(1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if rank == 0:
            print(f"epoch {epoch}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
