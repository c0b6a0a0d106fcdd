"""Binds a plan to the storage of a rank and runs it; decides nothing."""
