"""Slow forms of what fxzero does, to measure against; nothing else imports them but the options."""
