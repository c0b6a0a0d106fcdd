"""Compiled modules inside of Accelerate, the Hugging Face Trainer and Lightning, one module for each.

No other part of fxzero imports them, so that it needs none of these libraries. docs/migrating.md shows their use.
"""
