"""Lifetimes to offsets: where everything lies in the arena, and what a rank's bytes are for."""
