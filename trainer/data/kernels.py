"""The kernels: what workers do, from raw rows to packed parts. Each reads and writes files in the work folder.

ingest  chunk     -> rows-C.arrow: one batch per partition of the content hash; bands-C.npy
near    partition -> drops-P.npy: hashes of near duplicates, by ranges of the band key
settle  partition -> kept-P.arrow: rows without duplicates, ordered by content hash
pack    partition -> part-P-SPLIT.*: rows and token ids of each split
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from trainer.artifacts.dataset import END, SPLITS
from trainer.config.data import Data
from trainer.data import columns, dedup, pictures, readers
from trainer.data import job as jobs
from trainer.data.clean import make_cleaner
from trainer.data.examples import Bad, Example, to_example
from trainer.data.job import Job
from trainer.data.split import assign, split_hashes, stratum_of_each

# Rows as workers pass them on. `count` is how many equal rows of a chunk this one stands for.
ROWS = pa.schema(
    [
        ("hi", pa.uint64()), ("lo", pa.uint64()), ("text", pa.large_binary()), ("label", pa.large_string()),
        ("file", pa.int32()), ("line", pa.int64()), ("count", pa.int64()), ("pixels", pa.large_binary()),
    ]
)  # fmt: skip
# As pack.py joins them.
PACKED = pa.schema(
    [("id", pa.large_string()), ("text", pa.large_string()), ("label", pa.int32()), ("source", pa.large_string())]
)
_ENCODE_ROWS = 1000

Task = dict[str, Any]


@dataclass
class _Rows:
    """The rows of a chunk that are kept so far, column by column, and what was dropped."""

    texts: list[bytes] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    pixels: list[bytes] = field(default_factory=list)
    num_read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    bad: list[tuple[int, str]] = field(default_factory=list)


def ingest(task: Task) -> dict[str, Any]:
    """Read, clean and hash the rows of a chunk.

    Returns:
        read: number of rows; dropped: reason -> number; bad: [line, message] of each malformed row, up to the one too many.
    """
    work = Path(task["work"])
    job = jobs.load(work)
    config, chunk = job.config, task["chunk"]
    cleaner = make_cleaner(config.clean)
    folder, is_image = Path(chunk["path"]).parent, job.task == "image"
    rows = _Rows()
    num_bad = 0
    for line, row in readers.read(chunk, task["encoding"]):
        rows.num_read += 1
        example = row if isinstance(row, Bad) else to_example(row, config.text, config.label, job.task)
        if is_image and isinstance(example, Example):
            example = _with_pixels(example, config, folder)
        if isinstance(example, Bad):
            rows.dropped[f"malformed:{example.kind}"] += 1
            rows.bad.append((line, example.message))  # any of them can be the one too many, and then it is named
            num_bad += 1
            if num_bad > config.max_bad_rows:
                break
            continue
        text, reason = (example.text, "") if is_image else cleaner(example.text)
        if reason:
            rows.dropped[reason] += 1
            continue
        rows.texts.append(text.encode())
        rows.labels.append(example.label or "")
        rows.lines.append(line)
        rows.pixels.append(example.picture or b"")
    _write_rows(work, task, job, rows)
    return {"read": rows.num_read, "dropped": dict(rows.dropped), "bad": rows.bad}


def _with_pixels(example: Example, config: Data, folder: Path) -> Example | Bad:
    """The example with its picture decoded."""
    pixels = pictures.decode(example.picture, folder, config.image_size, config.image_channels)
    return pixels if isinstance(pixels, Bad) else Example(example.text, example.label, pixels)


def _write_rows(work: Path, task: Task, job: Job, rows: _Rows) -> None:
    """Write a chunk's rows by partition, equal ones of the same label as one, and their band keys."""
    config, number = job.config, task["index"]
    ids = dedup.content_ids(rows.pixels if job.task == "image" else rows.texts)
    names, codes = _codes(rows.labels)
    lines = np.array(rows.lines, np.int64)
    order = np.lexsort((lines, codes, ids[:, 1], ids[:, 0]))
    counts = np.ones(len(order), np.int64)
    if config.dedup.exact and len(order):
        keys = np.column_stack([ids[order], codes[order].astype(np.uint64)])
        starts = np.flatnonzero(np.append(True, (keys[1:] != keys[:-1]).any(axis=1)))
        counts = np.diff(np.append(starts, len(order)))
        order = order[starts]
    ids = ids[order]
    arrays = [
        columns.numbers(ids[:, 0]),
        columns.numbers(ids[:, 1]),
        columns.blobs([rows.texts[i] for i in order]),
        columns.strings([names[code] for code in codes[order]]),
        columns.numbers(np.full(len(order), task["chunk"]["file"], np.int32)),
        columns.numbers(lines[order]),
        columns.numbers(counts),
        columns.blobs([rows.pixels[i] for i in order]),
    ]
    table = pa.Table.from_arrays(arrays, schema=ROWS)
    bounds = [*_bounds(ids[:, 0], job.partitions), len(order)]
    with pa.ipc.new_file(work / f"rows-{number}.arrow", ROWS, options=_options()) as writer:
        for part in range(job.partitions):
            writer.write_batch(_one_batch(table.slice(bounds[part], bounds[part + 1] - bounds[part])))
    if config.dedup.near and job.task != "image":
        own = dedup.content_ids([name.encode() for name in names])[:, 0][codes[order]] if job.task != "lm" else None
        keys = dedup.band_keys([rows.texts[i] for i in order], config.dedup.threshold, own)
        _write_bands(work, number, keys, ids[:, 0])


def _codes(labels: list[str]) -> tuple[list[str], np.ndarray]:
    """The distinct labels in order, and the number of each row's."""
    names = sorted(set(labels))
    number = {name: code for code, name in enumerate(names)}
    return names, np.fromiter((number[label] for label in labels), np.int64, len(labels))


def _options() -> pa.ipc.IpcWriteOptions:
    return pa.ipc.IpcWriteOptions(compression="lz4", use_threads=False)


def _one_batch(table: pa.Table) -> pa.RecordBatch:
    arrays = [column.combine_chunks() for column in table.columns]
    return pa.RecordBatch.from_arrays(arrays, schema=table.schema)


def _write_bands(work: Path, number: int, keys: np.ndarray, hi: np.ndarray) -> None:
    flat, owners = keys.ravel(), np.repeat(hi, keys.shape[1])
    used = flat != 0
    flat, owners = flat[used], owners[used]
    order = np.argsort(flat, kind="stable")
    np.save(work / f"bands-{number}.npy", np.stack([flat[order], owners[order]]))


def _bounds(values: np.ndarray, partitions: int) -> list[int]:
    """Where in a sorted array of uint64 each of `partitions` (a power of two) equal ranges begins."""
    width = 2**64 // partitions
    starts = np.array([part * width for part in range(partitions)], np.uint64)
    return [int(start) for start in np.searchsorted(values, starts)]


def _range(values: np.ndarray, part: int, partitions: int) -> slice:
    """The place of one range in a sorted array."""
    bounds = [*_bounds(values, partitions), len(values)]
    return slice(bounds[part], bounds[part + 1])


def near(task: Task) -> dict[str, Any]:
    """Find the near duplicates among the rows whose band keys are in one range."""
    work, part = Path(task["work"]), task["partition"]
    job = jobs.load(work)
    keys, owners = [], []
    for number in range(job.num_chunks):
        bands = np.load(work / f"bands-{number}.npy", mmap_mode="r", allow_pickle=False)
        own = _range(bands[0], part, job.partitions)
        keys.append(np.array(bands[0, own]))
        owners.append(np.array(bands[1, own]))
    np.save(work / f"drops-{part}.npy", dedup.non_minimal(np.concatenate(keys), np.concatenate(owners)))
    return {}


def settle(task: Task) -> dict[str, Any]:
    """Remove the duplicates from a partition and order it by content hash.

    Returns:
        labels: label -> rows kept; dropped: reason -> number.
    """
    work, part = Path(task["work"]), task["partition"]
    job = jobs.load(work)
    batches = []
    for number in range(job.num_chunks):
        with pa.memory_map(str(work / f"rows-{number}.arrow")) as file:
            batches.append(pa.ipc.open_file(file, options=_reading()).get_batch(part))
    table = pa.Table.from_batches(batches, ROWS)
    hi, lo, file_number, line, count = (
        columns.to_numpy(table.column(name)) for name in ("hi", "lo", "file", "line", "count")
    )
    names, codes = _codes(table.column("label").to_pylist())
    order = np.lexsort((line, file_number, codes, lo, hi))
    total = int(count.sum())
    if job.config.dedup.exact:
        order = _one_per_text(order, hi, lo, codes, count)
    num_exact, num_near = total - len(order), 0
    if job.config.dedup.near and job.task != "image":
        survivors = order[~np.isin(hi[order], _drops(work, part, job.partitions))]
        num_near, order = len(order) - len(survivors), survivors
    with pa.ipc.new_file(work / f"kept-{part}.arrow", ROWS, options=_options()) as writer:
        writer.write_batch(_one_batch(table.take(columns.numbers(order))))
    kept = Counter(codes[order].tolist())
    return {
        "labels": {names[code]: number for code, number in kept.items()},
        "dropped": {"duplicate": num_exact, "near_duplicate": num_near},
    }


def _reading() -> pa.ipc.IpcReadOptions:
    return pa.ipc.IpcReadOptions(use_threads=False)


def _one_per_text(
    order: np.ndarray, hi: np.ndarray, lo: np.ndarray, codes: np.ndarray, count: np.ndarray
) -> np.ndarray:
    """Of rows with equal texts the first with the most frequent label (of equally frequent ones, the first by name)."""
    if not len(order):
        return order
    same_text = (hi[order][1:] == hi[order][:-1]) & (lo[order][1:] == lo[order][:-1])
    same_label = same_text & (codes[order][1:] == codes[order][:-1])
    label_starts = np.flatnonzero(np.append(True, ~same_label))
    votes = np.add.reduceat(count[order], label_starts)
    text_of = np.cumsum(np.append(True, ~same_text))[label_starts]
    # Of equal votes the first label stays first.
    ranked = np.lexsort((np.arange(len(votes)), -votes, text_of))
    firsts = ranked[np.append(True, np.diff(text_of[ranked]) != 0)]
    return np.asarray(order[label_starts[firsts]])


def _drops(work: Path, part: int, partitions: int) -> np.ndarray:
    found = []
    for number in range(partitions):
        drops = np.load(work / f"drops-{number}.npy", mmap_mode="r", allow_pickle=False)
        found.append(np.array(drops[_range(drops, part, partitions)]))
    return np.unique(np.concatenate(found))


def selected(work: Path, part: int, job: Job, names: list[str]) -> tuple[pa.Table, np.ndarray]:
    """A partition's rows that stay, some columns of them, and their label numbers (-1 without labels)."""
    with pa.memory_map(str(work / f"kept-{part}.arrow")) as file:
        table = pa.ipc.open_file(file, options=_reading()).read_all()
    if job.labels is None:
        codes = np.full(len(table), -1, np.int32)
        stay = np.arange(len(table))
    else:
        number = {label: code for code, label in enumerate(job.labels)}
        codes = np.array([number.get(label, -1) for label in table.column("label").to_pylist()], np.int32)
        stay = np.flatnonzero(codes >= 0)
    if job.limits is not None:
        stay = stay[: job.limits[part]]
    return table.select(names).take(columns.numbers(stay)), codes[stay]


def ids_of(table: pa.Table) -> np.ndarray:
    """(rows, 2) uint64 from the columns hi and lo."""
    return np.column_stack([columns.to_numpy(table.column("hi")), columns.to_numpy(table.column("lo"))])


def splits_of(table: pa.Table, codes: np.ndarray, job: Job) -> np.ndarray:
    """The split of each row, by its content hash."""
    assert job.cuts is not None
    hashes = split_hashes(ids_of(table), job.config.split.seed)
    # Equal texts are in the same partition, so that one partition shows all of them.
    return assign(hashes, stratum_of_each(hashes, codes) if len(job.cuts) > 1 else codes, job.cuts)


def pack(task: Task) -> dict[str, Any]:
    """Tokenise a partition and write its rows by split.

    Returns:
        for each split: rows, tokens, bytes of text.
    """
    work, part = Path(task["work"]), task["partition"]
    job = jobs.load(work)
    table, codes = selected(work, part, job, ["hi", "lo", "text", "file", "line", "pixels"])
    where = splits_of(table, codes, job)
    result = {}
    for number, name in enumerate(SPLITS):
        own = np.flatnonzero(where == number)
        stem = work / f"part-{part}-{name}"
        rows = table.take(columns.numbers(own))
        _write_packed(stem, rows, codes[own], job)
        result[name] = {"rows": len(own), "tokens": 0, "bytes": sum(map(len, rows.column("text").to_pylist()))}
        if job.task == "image":
            stem.with_name(f"{stem.name}.images").write_bytes(b"".join(rows.column("pixels").to_pylist()))
        else:
            result[name]["tokens"] = _write_tokens(stem, rows.column("text"), job, task)
    return result


def _write_packed(stem: Path, rows: pa.Table, codes: np.ndarray, job: Job) -> None:
    places = zip(columns.to_numpy(rows.column("file")), columns.to_numpy(rows.column("line")), strict=True)
    arrays = [
        columns.strings(dedup.hex_ids(ids_of(rows))),
        columns.blobs(rows.column("text").to_pylist(), pa.large_string()),
        columns.numbers(codes.astype(np.int32)),
        columns.strings([f"{job.names[file]}:{line}" for file, line in places]),
    ]
    with pa.ipc.new_file(f"{stem}.arrow", PACKED, options=_options()) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=PACKED))


def _write_tokens(stem: Path, texts: pa.ChunkedArray, job: Job, task: Task) -> int:
    """Write the token ids of some texts, and the number of each text's; returns the sum."""
    from trainer.data.tokenizer import load_encoder

    encode = load_encoder(Path(task["work"]) / "tokenizer.json", task["fast"], task["threads"])
    limit = job.config.max_length if job.task == "classify" else None
    end = np.array([END], np.uint32)
    lengths = []
    with open(f"{stem}.tokens", "wb") as file:
        for start in range(0, len(texts), _ENCODE_ROWS):
            batch = [text.decode() for text in texts.slice(start, _ENCODE_ROWS).to_pylist()]
            encoded = list(encode(batch))
            if limit is not None:
                encoded = [ids[:limit] for ids in encoded]
            else:
                encoded = [np.concatenate([ids, end]) for ids in encoded]
            lengths += [len(ids) for ids in encoded]
            file.write(np.concatenate(encoded).astype(task["dtype"]).tobytes())
    np.save(f"{stem}.lengths.npy", np.array(lengths, np.int64))
    return sum(lengths)
