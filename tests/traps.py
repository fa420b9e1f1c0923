"""Files made to do harm: whoever unpickles one leaves a canary."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path

import numpy as np


class Trap:
    """Unpickled, it makes the file `canary`."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return (exec, (f"open({str(self.canary)!r}, 'w').close()",))


def as_pickle(canary: Path) -> bytes:
    """A plain pickle."""
    return pickle.dumps(Trap(canary))


def as_array(canary: Path) -> bytes:
    """An .npy of objects, which numpy keeps as a pickle."""
    made = io.BytesIO()
    np.save(made, np.array([Trap(canary)], dtype=object), allow_pickle=True)
    return made.getvalue()


def as_weights(canary: Path) -> bytes:
    """A file as torch.save writes them."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_STORED) as file:
        file.writestr("archive/data.pkl", as_pickle(canary))
        file.writestr("archive/version", "3\n")
        file.writestr("archive/byteorder", "little")
    return made.getvalue()
