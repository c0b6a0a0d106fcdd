"""Save and resume: `torchrun --nproc-per-node 2 --max-restarts 3 examples/save_and_resume.py checkpoints`.

Started again, at any number of ranks, it goes on from the newest checkpoint; so do the ranks that torchrun restarts
after one of them has died.
"""

import sys

import torch
import torch.distributed as dist

import fxzero
from fxzero.models import GPT, GPT_PRESETS


def batch_of(step: int, rank: int) -> torch.Tensor:
    """The batch of a step, which depends on nothing else: so a resumed run sees the batches that it would have seen."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randint(GPT_PRESETS["tiny"].vocab_size, (4, 16), generator=generator)


def main(folder: str, num_steps: int) -> None:
    """Train to a number of steps, saving every second one."""
    if dist.is_torchelastic_launched():
        fxzero.init_process_group()  # as that of torch.distributed, also after a restart
    rank = dist.get_rank() if dist.is_initialized() else 0

    torch.manual_seed(0)
    model = GPT(GPT_PRESETS["tiny"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    zero = fxzero.compile(model, optimizer=optimizer, resume=folder)
    state = zero.resumed or {"step": 0, "scheduler": scheduler.state_dict()}
    scheduler.load_state_dict(state["scheduler"])

    for step in range(state["step"], num_steps):
        ids = batch_of(step, rank)
        loss = zero(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if rank == 0:
            print(f"step {step}: loss {loss.item():.6f}")
        if step % 2 == 1:
            fxzero.save(folder, zero, optimizer, extra={"step": step + 1, "scheduler": scheduler.state_dict()}, keep=2)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 6)
