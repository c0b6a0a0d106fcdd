"""Optimizers that need whole parameters: each parameter is stepped on one rank, its owner, which has its state."""
