"""The commands of `fxzero` beside `train`, and what all commands share: starting ranks, joining them, and errors."""
