"""The user's model taken over: its shards, weights, optimizers and calls."""
