"""The kernels: what workers do, from raw rows to packed parts. Each reads and writes files in the work folder.

ingest  chunk     -> rows-C.arrow: one batch per partition of the content hash; bands-C.npy
near    partition -> drops-P.npy: hashes of near duplicates, by ranges of the band key
settle  partition -> kept-P.arrow: rows without duplicates, ordered by content hash
pack    partition -> part-P-SPLIT.arrow: rows with label, split and token ids
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from trainer.artifacts.dataset import END, SPLITS
from trainer.data import dedup, pictures, readers
from trainer.data import job as jobs
from trainer.data.clean import make_cleaner
from trainer.data.examples import Bad, to_example
from trainer.data.job import Job
from trainer.data.split import assign, split_hashes

# Rows as workers pass them on. `count` is how many equal rows of a chunk this one stands for.
ROWS = pa.schema(
    [
        ("hi", pa.uint64()), ("lo", pa.uint64()), ("text", pa.large_binary()), ("label", pa.string()),
        ("file", pa.int32()), ("line", pa.int64()), ("count", pa.int64()), ("pixels", pa.large_binary()),
    ]
)  # fmt: skip
MAX_EXAMPLES = 1000

Task = dict[str, Any]


def partition_of(hashes: np.ndarray, partitions: int) -> np.ndarray:
    """The range of uint64 that each hash is in, of `partitions` (a power of two) equal ones."""
    bits = partitions.bit_length() - 1
    return (hashes >> np.uint64(64 - bits)).astype(np.int64) if bits else np.zeros(len(hashes), np.int64)


def ingest(task: Task) -> dict[str, Any]:
    """Read, clean and hash the rows of a chunk.

    Returns:
        read: number of rows; dropped: reason -> number; bad: [line, message] of the first malformed rows.
    """
    work = Path(task["work"])
    job = jobs.load(work)
    config, chunk = job.config, task["chunk"]
    cleaner = make_cleaner(config.clean)
    dropped: Counter[str] = Counter()
    bad: list[tuple[int, str]] = []
    num_read = num_bad = 0
    texts: list[bytes] = []
    labels: list[str | None] = []
    lines: list[int] = []
    images: list[bytes] = []
    for line, row in readers.read(chunk, task["encoding"]):
        num_read += 1
        example = row if isinstance(row, Bad) else to_example(row, config.text, config.label, job.task)
        pixels = b""
        if job.task == "image" and not isinstance(example, Bad):
            decoded = pictures.decode(
                example.pixels, Path(chunk["path"]).parent, config.image_size, config.image_channels
            )
            pixels, example = (b"", decoded) if isinstance(decoded, Bad) else (decoded, example)
        if isinstance(example, Bad):
            dropped[f"malformed:{example.kind}"] += 1
            num_bad += 1
            if len(bad) < MAX_EXAMPLES:
                bad.append((line, example.message))
            if num_bad > config.max_bad_rows:
                break
            continue
        text = example.text
        if job.task != "image":
            text, reason = cleaner(text)
            if reason:
                dropped[reason] += 1
                continue
        texts.append(text.encode())
        labels.append(example.label)
        lines.append(line)
        if job.task == "image":
            images.append(pixels)
    _write_rows(work, task, job, texts, labels, lines, images)
    return {"read": num_read, "dropped": dict(dropped), "bad": bad}


def _write_rows(
    work: Path,
    task: Task,
    job: Job,
    texts: list[bytes],
    labels: list[str | None],
    lines: list[int],
    images: list[bytes],
) -> None:
    """Write a chunk's rows by partition, equal ones of the same label as one, and their band keys."""
    config, number = job.config, task["index"]
    ids = dedup.content_ids(images or texts)
    names, codes = np.unique(np.array([label or "" for label in labels], dtype=object), return_inverse=True)
    order = np.lexsort((np.array(lines, np.int64), codes, ids[:, 1], ids[:, 0])) if len(ids) else np.empty(0, np.int64)
    sorted_ids, sorted_codes = ids[order], codes[order]
    counts = np.ones(len(order), np.int64)
    if config.dedup.exact and len(order):
        new = np.ones(len(order), bool)
        new[1:] = (sorted_ids[1:] != sorted_ids[:-1]).any(axis=1) | (sorted_codes[1:] != sorted_codes[:-1])
        starts = np.flatnonzero(new)
        counts = np.diff(np.append(starts, len(order)))
        order, sorted_ids, sorted_codes = order[starts], sorted_ids[starts], sorted_codes[starts]
    with_labels = job.task != "lm"
    columns = [
        pa.array(sorted_ids[:, 0]), pa.array(sorted_ids[:, 1]),
        pa.array([texts[i] for i in order], pa.large_binary()),
        pa.array([names[code] if with_labels else None for code in sorted_codes], pa.string()),
        pa.array(np.full(len(order), task["chunk"]["file"], np.int32)),
        pa.array(np.array(lines, np.int64)[order]), pa.array(counts),
        pa.array([images[i] for i in order] if images else [None] * len(order), pa.large_binary()),
    ]  # fmt: skip
    table = pa.Table.from_arrays(columns, schema=ROWS)
    bounds = np.searchsorted(partition_of(sorted_ids[:, 0], job.partitions), np.arange(job.partitions + 1))
    with pa.ipc.new_file(work / f"rows-{number}.arrow", ROWS, options=_options()) as writer:
        for start, end in zip(bounds[:-1], bounds[1:], strict=True):
            writer.write_batch(_one_batch(table.slice(start, end - start)))
    if config.dedup.near and not images:
        _write_bands(work, number, [texts[i] for i in order], sorted_ids[:, 0], config.dedup.threshold)


def _options() -> pa.ipc.IpcWriteOptions:
    return pa.ipc.IpcWriteOptions(compression="lz4", use_threads=False)


def _one_batch(table: pa.Table) -> pa.RecordBatch:
    table = table.combine_chunks()
    batches = table.to_batches()
    return batches[0] if batches else pa.RecordBatch.from_pylist([], schema=ROWS)


def _write_bands(work: Path, number: int, texts: list[bytes], hi: np.ndarray, threshold: float) -> None:
    keys = dedup.band_keys(texts, threshold)
    flat, owners = keys.ravel(), np.repeat(hi, keys.shape[1])
    used = flat != 0
    flat, owners = flat[used], owners[used]
    order = np.argsort(flat, kind="stable")
    np.save(work / f"bands-{number}.npy", np.stack([flat[order], owners[order]]))


def _range(values: np.ndarray, part: int, partitions: int) -> slice:
    """Where the hashes of a partition are in a sorted array."""
    width = 2**64 // partitions
    start = int(np.searchsorted(values, np.uint64(part * width))) if part else 0
    end = int(np.searchsorted(values, np.uint64((part + 1) * width))) if part + 1 < partitions else len(values)
    return slice(start, end)


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
        rows, labels: label -> rows kept; dropped: reason -> number.
    """
    work, part = Path(task["work"]), task["partition"]
    job = jobs.load(work)
    batches = []
    for number in range(job.num_chunks):
        with pa.memory_map(str(work / f"rows-{number}.arrow")) as file:
            batches.append(pa.ipc.open_file(file).get_batch(part))
    table = pa.Table.from_batches(batches, ROWS)
    hi, lo, file_number, line, count = (table.column(name).to_numpy() for name in ("hi", "lo", "file", "line", "count"))
    labels = table.column("label").to_pylist()
    names, codes = np.unique(np.array([label or "" for label in labels], dtype=object), return_inverse=True)
    order = np.lexsort((line, file_number, codes, lo, hi))
    total = int(count.sum())
    if job.config.dedup.exact:
        order = _one_per_text(order, hi, lo, codes, count)
    num_exact = total - len(order)
    num_near = 0
    if job.config.dedup.near and job.task != "image":
        drops = _drops(work, part, job.partitions)
        survivors = order[~np.isin(hi[order], drops)]
        num_near, order = len(order) - len(survivors), survivors
    with pa.ipc.new_file(work / f"kept-{part}.arrow", ROWS, options=_options()) as writer:
        writer.write_batch(_one_batch(table.take(pa.array(order))))
    kept = Counter(codes[order].tolist())
    dropped = {"duplicate": num_exact, "near_duplicate": num_near}
    return {
        "labels": {str(names[code]): number for code, number in kept.items()},
        "dropped": dropped,
        "rows": len(order),
    }


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
    # Stable: of equal votes the first label stays first.
    ranked = np.lexsort((np.arange(len(votes)), -votes, text_of))
    firsts = ranked[np.append(True, np.diff(text_of[ranked]) != 0)]
    return order[label_starts[firsts]]


def _drops(work: Path, part: int, partitions: int) -> np.ndarray:
    found = []
    for number in range(partitions):
        drops = np.load(work / f"drops-{number}.npy", mmap_mode="r", allow_pickle=False)
        found.append(np.array(drops[_range(drops, part, partitions)]))
    return np.unique(np.concatenate(found))


def selected(work: Path, part: int, job: Job, columns: list[str]) -> tuple[pa.Table, np.ndarray]:
    """A partition's rows that stay, some columns of them, and their label numbers (-1 without labels)."""
    with pa.memory_map(str(work / f"kept-{part}.arrow")) as file:
        table = pa.ipc.open_file(file, options=pa.ipc.IpcReadOptions(use_threads=False)).read_all()
    if job.labels is None:
        codes = np.full(len(table), -1, np.int32)
        stay = np.arange(len(table))
    else:
        number = {label: code for code, label in enumerate(job.labels)}
        codes = np.array([number.get(label, -1) for label in table.column("label").to_pylist()], np.int32)
        stay = np.flatnonzero(codes >= 0)
    if job.limits is not None:
        stay = stay[: job.limits[part]]
    return table.select(columns).take(pa.array(stay)), codes[stay]


def splits_of(table: pa.Table, codes: np.ndarray, job: Job) -> np.ndarray:
    """The split of each row, by its content hash."""
    assert job.cuts is not None
    ids = np.stack([table.column("hi").to_numpy(), table.column("lo").to_numpy()], axis=1)
    return assign(split_hashes(ids, job.config.split.seed), codes, job.cuts)


def pack(task: Task) -> dict[str, Any]:
    """Tokenise a partition and write its rows by split.

    Returns:
        for each split: rows, tokens, bytes of text.
    """
    work, part = Path(task["work"]), task["partition"]
    job = jobs.load(work)
    table, codes = selected(work, part, job, ["hi", "lo", "text", "file", "line", "pixels"])
    where = splits_of(table, codes, job)
    encode = None
    if job.task != "image":
        from trainer.data.tokenizer import load_encoder

        encode = load_encoder(work / "tokenizer.json", task["fast"])
    result = {}
    for number, name in enumerate(SPLITS):
        own = np.flatnonzero(where == number)
        result[name] = _pack_split(
            work, f"part-{part}-{name}", table.take(pa.array(own)), codes[own], job, encode, task["dtype"]
        )
    return result


def _pack_split(
    work: Path, name: str, table: pa.Table, codes: np.ndarray, job: Job, encode: Any, dtype: str
) -> dict[str, int]:
    texts = [text.decode() for text in table.column("text").to_pylist()]
    ids = np.stack([table.column("hi").to_numpy(), table.column("lo").to_numpy()], axis=1)
    places = zip(table.column("file").to_pylist(), table.column("line").to_pylist(), strict=True)
    rows = pa.table(
        {
            "id": pa.array(dedup.hex_ids(ids), pa.string()),
            "text": pa.array(texts, pa.large_string()),
            "label": pa.array(codes, pa.int32()),
            "source": pa.array([f"{job.names[file]}:{line}" for file, line in places], pa.string()),
        }
    )
    with pa.ipc.new_file(work / f"{name}.arrow", rows.schema, options=_options()) as writer:
        writer.write_table(rows)
    counts = {"rows": len(texts), "tokens": 0, "bytes": sum(map(len, table.column("text").to_pylist()))}
    if job.task == "image":
        content = b"".join(table.column("pixels").to_pylist())
        (work / f"{name}.images").write_bytes(content)
        return counts
    limit = job.config.max_length if job.task == "classify" else 0
    tail = [END] if job.task == "lm" else []
    encoded = [np.array([*tokens[: limit or None], *tail], np.uint32) for tokens in encode(texts)]
    lengths = np.array([len(tokens) for tokens in encoded], np.int64)
    flat = np.concatenate(encoded) if encoded else np.empty(0, np.uint32)
    flat.astype(dtype).tofile(work / f"{name}.tokens")
    np.save(work / f"{name}.lengths.npy", lengths)
    counts["tokens"] = int(lengths.sum())
    return counts
