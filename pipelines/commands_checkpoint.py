"""What `millrace checkpoint` does."""

from __future__ import annotations

import sys
import time
from argparse import Namespace

from trainer import storage
from trainer.errors import EXIT_OK


def checkpoint(args: Namespace) -> int:
    """`millrace checkpoint ls|verify|export`."""
    {"ls": _list, "verify": _verify, "export": _export}[args.action](args)
    return EXIT_OK


def _list(args: Namespace) -> None:
    from trainer.train.inventory import listing

    run, found = "", listing(args.place)
    if not found:
        print(f"no checkpoints in {args.place}", file=sys.stderr)
    for entry in found:
        if entry.run != run:
            run = entry.run
            print(run)
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry.time)) if entry.time else "-"
        score = " ".join(f"{name}={value:.6g}" for name, value in entry.score) or "-"
        best = ", best" if entry.best else ""
        print(f"  step {entry.step:<9} {when:<19} {entry.bytes / 1e6:>10.2f} MB  {score}  {entry.state}{best}")


def _verify(args: Namespace) -> None:
    from trainer.train.inventory import candidates, verified

    for entry in candidates(args.place, args.step):
        with verified(entry):
            print(f"{entry.uri}: every byte is as it was written")


def _export(args: Namespace) -> None:
    from trainer.train.export import export

    step, metrics = export(args.place, storage.local_path(args.out), args.step)
    said = " ".join(f"{name}={value:.6g}" for name, value in metrics.items())
    print(f"{args.out}: the weights of step {step} {said}".rstrip())
