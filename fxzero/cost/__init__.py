"""Seconds: of operators, of collectives, of a whole step, the least that a step can take, and choices made by them."""
