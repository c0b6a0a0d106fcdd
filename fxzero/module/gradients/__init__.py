"""Gradients of a backward: of which outputs, those that autograd.grad asks for, and norms over all ranks."""
