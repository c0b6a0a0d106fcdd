"""What is measured of one tree, in its own processes: a file for each scenario.

Of fxzero these use its public API alone, as the tree may be of long ago.
"""

from __future__ import annotations
