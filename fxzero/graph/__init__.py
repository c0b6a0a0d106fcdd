"""A step of training: its graph and vocabulary, the layout of buckets, the rules of a safe schedule, its text."""

from __future__ import annotations
