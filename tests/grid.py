"""Grids of random cases: a bounded sample, or with FULL=1 all; SEED=… repeats one."""

from __future__ import annotations

import os
import random


def seed() -> int:
    """SEED of the environment, or one drawn now, which the test is to print."""
    return int(os.environ.get("SEED") or random.randrange(10**6))


def cases(sample: int, full: int) -> int:
    """Number of cases of a grid."""
    return full if os.environ.get("FULL") not in (None, "", "0") else sample
