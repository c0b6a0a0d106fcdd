"""The user's model taken over: its shards, weights and calls."""
