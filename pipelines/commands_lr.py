"""`millrace lr-find`: an LR range test on the dataset of the last run, as a table on the terminal and a page."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from pipelines.commands_kfp import params_of
from trainer import storage
from trainer.artifacts.dataset import Dataset
from trainer.errors import EXIT_OK, ArtifactError


def lr_find(args: Namespace) -> int:
    """`millrace lr-find`."""
    params, folder = params_of(args.overrides), Path(args.dataset)
    if not (folder / storage.MANIFEST).is_file():
        raise ArtifactError(
            f"{folder}: no dataset", "make it: millrace run --until preprocess; or name one: --dataset DIR"
        )
    from trainer.train import lr_find, lr_page

    tried = lr_find.Range(args.start_lr, args.end_lr, args.num_iter, args.smoothing, args.divergence)
    found = lr_find.find(params, Dataset(folder), tried)
    path = Path(args.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    storage.write_atomic(path, lr_page.page(found).encode())
    print(f"{lr_page.text(found)}\n\nwrote {path}")
    return EXIT_OK
