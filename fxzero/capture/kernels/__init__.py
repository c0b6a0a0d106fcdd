"""Operators whose fake version, or whose schema, does not say what their kernel does."""
