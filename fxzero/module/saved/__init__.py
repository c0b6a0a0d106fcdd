"""Checkpoints of a compiled model and its optimizers in files of fxzero's own.

parts.py names all that a rank has to save; save.py writes it, load.py reads it at any number of ranks, and fixes the
layout as it was.
"""
