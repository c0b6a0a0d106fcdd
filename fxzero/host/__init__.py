"""The process and the machine that fxzero runs on: the allocator, the garbage collector, memory in use."""
