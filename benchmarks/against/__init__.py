"""Is this working tree slower than another revision of it? Both are measured in turns, in one run.

    python -m benchmarks.against 9792951 single_rank
    python -m benchmarks.against main network --rates 2 1 --check --json network.json

"Here" is this working tree as it is, "there" the revision, in a worktree that is removed afterwards. What is measured,
and the models, are this tree's for both; from each checkout comes nothing but fxzero, by its public API. A start is a
new pair of workers, and a round of it one turn of each, in alternating order; each round gives a ratio here / there.

A quantity is not slower if the 95 % interval of the median ratio reaches down to 1.00 and the median is at most 1.02.
Of 40 quantities that are the same, the interval calls one slower by chance; where a machine is noisy, more medians are
above 1.02 by chance: a wide interval says so, and asks for more starts and rounds.
"""

from __future__ import annotations
