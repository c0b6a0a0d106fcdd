"""Optimizers of shards: which ones are right, whose state they hold, and what is checked before a step."""
