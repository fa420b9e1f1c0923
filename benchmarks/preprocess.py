"""Preprocess and tokenise: millrace beside Hugging Face datasets + tokenizers, on the same rows, in turns.

    python benchmarks/preprocess.py [--megabytes 440] [--rounds 1] [--no-near]
    python benchmarks/preprocess.py --memory [--megabytes 2048]

The first prints one table of wall time, CPU time, peak memory of the process tree and the ratio; both read JSON lines,
clean (NFC, control characters), filter by length, remove exact and near duplicates, split, train the same tokenizer on
the same amount of text, tokenise and write. Near duplicates are found in the same bands of five-word shingles: by the
peer with one permutation per value, as text-dedup has it, by millrace with one for all of them. The second shows how much memory
`preprocess` takes for a large file. Rows: functions and classes of the Python sources on this machine, with 20 % exact
and 10 % near duplicates planted.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VOCAB_SIZE = 8192
TRAIN_BYTES = 512 * VOCAB_SIZE
_BLOCK = re.compile(r"^(?=(?:async )?def |class |@)", re.MULTILINE)


def blocks() -> Iterator[str]:
    """Pieces of Python sources that begin with a function or class at the margin."""
    paths = sysconfig.get_paths()
    for folder in (paths["stdlib"], paths["purelib"]):
        for path in sorted(Path(folder).rglob("*.py")):
            try:
                text = path.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue
            yield from (block for block in _BLOCK.split(text) if 50 <= len(block) <= 20_000)


def write_rows(path: Path, num_bytes: int) -> int:
    """Write JSON lines of about `num_bytes`; returns the number of rows."""
    draw = random.Random(0)
    rows = size = 0
    recent: list[str] = []
    with open(path, "w", encoding="utf-8") as file:
        lap = 0
        while size < num_bytes:
            for block in blocks():
                # Later laps over the sources are made different text by renaming what occurs most.
                text = block if lap == 0 else re.sub(r"\b(self|return|if|the|in)\b", rf"\g<1>{lap}", block)
                kind = draw.random()
                if recent and kind < 0.2:
                    text = draw.choice(recent)
                elif recent and kind < 0.3:
                    text = draw.choice(recent) + f"\n# copy {rows}\n"
                else:
                    recent = [*recent[-999:], text]
                line = json.dumps({"text": text, "label": f"label{len(text) % 20}"}, ensure_ascii=False) + "\n"
                file.write(line)
                rows, size = rows + 1, size + len(line.encode())
                if size >= num_bytes:
                    break
            lap += 1
    return rows


def ours(source: Path, out: Path, near: bool) -> list[str]:
    """The command that runs the stage."""
    words = [f"data.source={source}", f"data.dedup.near={near}", f"data.tokenizer.vocab_size={VOCAB_SIZE}"]
    words += ["data.clean.min_chars=50", "data.clean.max_chars=100000", "data.max_length=100000"]
    return [sys.executable, "-m", "trainer", "preprocess", "--out", f"dataset={out}", *words]


def peer(source: Path, out: Path, near: bool) -> list[str]:
    """The command that runs the peer: this file again, in a process of its own."""
    return [sys.executable, __file__, "--peer", str(source), str(out), *([] if near else ["--no-near"])]


def run_peer(source: str, out: str, near: bool) -> None:
    """The same work with datasets + tokenizers, as their documentation and text-dedup do it."""
    import hashlib
    import unicodedata

    import datasets
    import numpy as np
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    from trainer.data.tokenizer import PATTERN

    datasets.disable_progress_bars()
    processes = os.cpu_count() or 1
    control = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
    rows = datasets.load_dataset("json", data_files=source, split="train", cache_dir=f"{out}-cache")

    def clean(batch: dict) -> dict:
        texts = [control.sub("", unicodedata.normalize("NFC", text)) for text in batch["text"]]
        return {"text": texts, "hash": [hashlib.sha256(text.encode()).hexdigest() for text in texts]}

    rows = rows.map(clean, batched=True, num_proc=processes)
    rows = rows.filter(lambda batch: [50 <= len(t) <= 100_000 for t in batch["text"]], batched=True, num_proc=processes)
    seen: set[str] = set()

    def new(batch: dict) -> list[bool]:
        return [not (name in seen or seen.add(name)) for name in batch["hash"]]

    rows = rows.filter(new, batched=True)
    if near:
        bands, length = 9, 13
        generator = np.random.default_rng(1)
        prime = np.uint64((1 << 61) - 1)
        a, b = generator.integers(1, 2**31, (2, bands * length), dtype=np.uint64)

        def signatures(batch: dict) -> dict:
            found = []
            for text in batch["text"]:
                words = re.findall(r"\w+", text.lower())
                shingles = {" ".join(words[i : i + 5]) for i in range(max(len(words) - 4, 1))}
                hashes = np.array(
                    [int.from_bytes(hashlib.sha1(each.encode()).digest()[:4], "little") for each in shingles], np.uint64
                )
                least = ((hashes[:, None] * a + b) % prime & np.uint64(2**32 - 1)).min(axis=0)
                found.append([least[i * length : (i + 1) * length].tobytes() for i in range(bands)])
            return {"bands": found}

        signed = rows.map(signatures, batched=True, num_proc=processes)
        buckets: dict[tuple[int, bytes], str] = {}
        for keys, name in zip(signed["bands"], signed["hash"], strict=True):
            for band, key in enumerate(keys):
                buckets[band, key] = min(buckets.get((band, key), name), name)
        keep = [
            all(buckets[band, key] == name for band, key in enumerate(keys))
            for keys, name in zip(signed["bands"], signed["hash"], strict=True)
        ]
        rows = rows.select(np.flatnonzero(keep))
    held = rows.train_test_split(test_size=0.2, seed=0)
    halves = held["test"].train_test_split(test_size=0.5, seed=0)
    splits = datasets.DatasetDict(train=held["train"], val=halves["train"], test=halves["test"])

    def sample() -> Iterator[str]:
        size = 0
        for text in splits["train"]["text"]:
            yield text
            size += len(text.encode())
            if size >= TRAIN_BYTES:
                return

    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PATTERN), "isolated"), byte_level])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        sample(), trainers.BpeTrainer(vocab_size=VOCAB_SIZE, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.save(f"{out}-tokenizer.json")

    def tokenise(batch: dict) -> dict:
        return {"ids": [encoding.ids for encoding in tokenizer.encode_batch_fast(batch["text"])]}

    splits.map(tokenise, batched=True, num_proc=processes).save_to_disk(out)


def measure(command: list[str]) -> tuple[float, float, float]:
    """Wall seconds, CPU seconds of all processes, and peak resident megabytes of the process tree."""
    import psutil

    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
    before = os.times()
    start = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    tree, peak = psutil.Process(process.pid), 0
    while True:
        with suppress(psutil.NoSuchProcess):
            peak = max(peak, sum(_resident(each) for each in [tree, *tree.children(recursive=True)]))
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.5)
            break
    wall = time.perf_counter() - start
    after = os.times()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return wall, cpu, peak / 1e6


def _resident(process: object) -> int:
    """Proportional share of memory, so that pages shared by workers count once."""
    try:
        return int(process.memory_full_info().pss)  # type: ignore[attr-defined]
    except Exception:
        return 0


def compare(folder: Path, megabytes: int, rounds: int, near: bool) -> None:
    """Print the table."""
    source = folder / "rows.jsonl"
    rows = write_rows(source, megabytes << 20)
    best: dict[str, tuple[float, float, float]] = {}
    for _ in range(rounds):
        for name, command in (("millrace", ours), ("datasets + tokenizers", peer)):
            for leftover in folder.glob("out*"):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            best[name] = min(best.get(name, (1e9, 1e9, 1e9)), measure(command(source, folder / "out", near)))
    print(
        f"{rows:,} rows, {megabytes} MiB of JSON lines, {os.cpu_count()} cores, best of {rounds}, near duplicates: {near}"
    )
    print("| | wall s | CPU s | peak MB | MB/s |\n|---|---:|---:|---:|---:|")
    for name, (wall, cpu, peak) in best.items():
        print(f"| {name} | {wall:.1f} | {cpu:.1f} | {peak:.0f} | {megabytes / wall:.1f} |")
    ratio = [theirs / own for own, theirs in zip(best["millrace"], best["datasets + tokenizers"], strict=True)]
    print(f"| ratio | {ratio[0]:.1f}x | {ratio[1]:.1f}x | {ratio[2]:.1f}x | |")


def memory(folder: Path, megabytes: int, engine: str) -> None:
    """Print the peak memory of the stage on a large file."""
    source = folder / "rows.jsonl"
    rows = write_rows(source, megabytes << 20)
    wall, cpu, peak = measure([*ours(source, folder / "out", True), f"data.engine={engine}"])
    print("| rows | MiB | engine | wall s | CPU s | peak MB of all processes |\n|---:|---:|---|---:|---:|---:|")
    print(f"| {rows:,} | {megabytes} | {engine} | {wall:.0f} | {cpu:.0f} | {peak:.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=0, help="size of the raw file (440, or 2048 with --memory)")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--no-near", action="store_true", help="leave near duplicates in, on both sides")
    parser.add_argument("--memory", action="store_true", help="measure memory on a large file instead")
    parser.add_argument("--engine", default="daft", help="with --memory: daft or pool")
    parser.add_argument("--peer", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        run_peer(*args.peer, near=not args.no_near)
        return
    with tempfile.TemporaryDirectory(prefix="millrace-bench-") as name:
        if args.memory:
            memory(Path(name), args.megabytes or 2048, args.engine)
        else:
            compare(Path(name), args.megabytes or 440, args.rounds, not args.no_near)


if __name__ == "__main__":
    main()
