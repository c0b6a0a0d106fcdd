"""Steps on one GPU, alone and as two NCCL ranks over sockets, against PyTorch's own ways to run them."""
