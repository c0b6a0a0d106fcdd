"""Fused compute: which operators become regions of a step, and what is saved for backward; `FuseCompute` runs it."""
