"""What all tests share: one thread each, so that two of them share two cores, and the repository's root."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

# Before any test module imports torch or numpy.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Started in the background, a shell has us ignore it, and what we start would too.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT
