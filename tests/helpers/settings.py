"""A module of settings, which tests change."""

SCALE = 1.0
