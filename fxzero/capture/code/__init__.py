"""Reads the user's code: which files are his, and what names it mentions."""
