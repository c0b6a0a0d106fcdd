"""A step of training: its graph and vocabulary, the layout of buckets, the rules of a safe schedule, its text."""
