"""What the ranks of one model agree on: phases, steps taken together, the order of collectives, equal models."""
