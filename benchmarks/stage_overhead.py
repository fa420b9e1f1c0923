"""Stage overhead: a whole stage process against the bare work of the stage's function.

python benchmarks/stage_overhead.py

Runs a stage with next to no work (preprocess of 200 rows) as a process and as a function in a
process that has everything imported. The difference is what the contract costs: starting Python, reading parameters,
checking inputs, building, sealing and publishing outputs, recording. Runs alternate, so that a busy machine is equally
unfair to both; medians are reported. Goal: at most 1 s.
"""

from __future__ import annotations

import contextlib
import csv
import io
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RUNS = 7


def make_rows(path: Path) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows([f"the {i}th text of {'many' if i % 2 else 'few'} words", i % 2] for i in range(200))


def bare(source: Path, folder: Path) -> float:
    """Seconds of the stage's function alone, everything imported."""
    from trainer.config.load import load
    from trainer.data.stage import run
    from trainer.stage import Call

    params = load(None, [f"data.source={source}", "data.tokenizer.vocab_size=300"])
    folder.mkdir()
    with contextlib.redirect_stdout(io.StringIO()):
        start = time.perf_counter()
        run(Call(params, {}, {"dataset": folder}, folder.with_name(f"{folder.name}-scratch")))
        return time.perf_counter() - start


def process(source: Path, folder: Path) -> float:
    """Seconds of `python -m trainer preprocess`, from start to exit."""
    command = [sys.executable, "-m", "trainer", "preprocess", "--out", f"dataset={folder}", f"data.source={source}"]
    start = time.perf_counter()
    subprocess.run([*command, "data.tokenizer.vocab_size=300"], check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        source = root / "rows.csv"
        make_rows(source)
        bare(source, root / "warm-up")
        pairs = [(bare(source, root / f"bare-{i}"), process(source, root / f"stage-{i}")) for i in range(RUNS)]
    function = statistics.median(pair[0] for pair in pairs)
    stage = statistics.median(pair[1] for pair in pairs)
    overhead = statistics.median(b - a for a, b in pairs)
    print(f"{'':<28}{'median of ' + str(RUNS):>14}")
    print(f"{'stage function, warm':<28}{function:>12.3f} s")
    print(f"{'stage process':<28}{stage:>12.3f} s")
    print(f"{'overhead':<28}{overhead:>12.3f} s   goal <= 1 s: {'met' if overhead <= 1 else 'missed'}")


if __name__ == "__main__":
    main()
