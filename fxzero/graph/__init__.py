"""What a step is: the graph and its vocabulary, the layout of buckets, the rules of a safe schedule, its text."""

from __future__ import annotations
