"""What ranks exchange: collectives bound to their buffers, one backend a file, and agreement over the store."""
