"""The preprocess stage: raw data -> a dataset folder.

    resolve -> chunks -> ingest -> near -> settle -> choose rows and splits -> tokenizer -> pack -> join

Rows pass between these steps through files in the scratch folder, partitioned by content hash, so memory is bounded by
a chunk and a partition whatever the size of the data, and the result does not depend on workers or engine.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from trainer import log, storage
from trainer.artifacts.dataset import SPLITS, Spec, spec_meta
from trainer.config import Params
from trainer.data import builtin, card, chunks, engine, kernels, pack, sources, split, tokenizer
from trainer.data.clean import make_cleaner
from trainer.data.job import Job
from trainer.errors import DataError, redact
from trainer.stage import Call, Result

# Raw bytes per partition: what one worker holds at a time when duplicates are removed and texts are tokenised.
PARTITION_BYTES = 16 << 20
# Text to train the tokenizer on, per token of the vocabulary: more changes few merges and takes its time.
TOKENIZER_BYTES = 512
_MALFORMED = "malformed:"
# More labels than this, all of them rare, are no labels.
MANY_LABELS = 20
# Malformed rows that are named one by one; the others are counted.
_SHOWN_BAD = 5


def run(call: Call) -> Result:
    """Run the stage; see `trainer.stage`.

    Raises:
        DataError: the raw data cannot be used; the message names file, line and reason.
    """
    work = call.scratch / "preprocess"
    storage.remove(work)
    work.mkdir(parents=True)
    try:
        return _run(call.params, call.outputs["dataset"], work)
    finally:
        storage.remove(work)  # nothing of it is used again


def _run(params: Params, out: Path, work: Path) -> Result:
    data, task = params.data, params.task.name
    make_cleaner(data.clean)  # a wrong language is found before any work
    source = sources.resolve(data.source, data.format, work)
    plan = chunks.plan(source.files, data.encoding, (data.text, data.label), task, work)
    total = sum(chunk["end"] - chunk["start"] for chunk in plan)
    partitions = 1
    while partitions * PARTITION_BYTES < total:
        partitions *= 2
    names = [file.name for file in source.files]
    job = Job(data.model_dump(mode="json"), task, partitions, len(plan), names).save(work)
    chosen = "inline" if total <= engine.SMALL_BYTES and data.engine != "ray" else data.engine
    log.say("preprocess: reading", files=len(names), bytes=total, chunks=len(plan), engine=chosen)
    with engine.Engine(chosen, data.workers) as runs_on:
        runner = _Runner(runs_on, work, small=total <= engine.LIGHT_BYTES)
        num_read, dropped = _ingest(runner, plan, names, params)
        parts: list[dict[str, Any]] = [{"partition": part} for part in range(partitions)]
        if data.dedup.near and task != "image":
            runner.all("near", parts)
        settled = runner.all("settle", parts)
        for result in settled:
            dropped.update(result["dropped"])
        job, label_counts = _choose(job, work, settled, dropped, params)
        spec, fast = _spec_and_tokenizer(job.save(work), work, params)
        threads = engine.num_workers(data.workers) if chosen == "inline" else 1
        extra = {"fast": fast, "dtype": pack.token_dtype(spec.vocab_size), "threads": threads}
        packed = runner.all("pack", [{**part, **extra} for part in parts])
    meta: dict[str, Any] = {
        "spec": spec_meta(spec), "task": task, "source": redact(data.source), "data_version": source.version,
        "num_read": num_read, "dropped": {reason: number for reason, number in sorted(dropped.items()) if number},
        "label_counts": label_counts,
    }  # fmt: skip
    _write(out, work, job, packed, spec, meta, params)
    if meta["dropped"]:
        log.say("preprocess: dropped", **meta["dropped"])
    log.say("preprocess: done", read=num_read, kept=meta["kept"], **meta["rows"], labels=len(job.labels or []))
    metrics = {"rows": float(meta["kept"]), "dropped": float(num_read - meta["kept"])}
    return Result(metrics=metrics, meta={"dataset": meta})


def _write(
    out: Path, work: Path, job: Job, packed: list[dict[str, Any]], spec: Spec, meta: dict[str, Any], params: Params
) -> None:
    """Join the packed parts into the dataset folder; `meta` gets the counts of what is written."""
    counts = {name: _sum([result[name] for result in packed]) for name in SPLITS}
    meta |= {key: {name: counts[name][key] for name in SPLITS} for key in ("rows", "tokens", "bytes")}
    meta["kept"] = sum(meta["rows"].values())
    if params.data.source.startswith("builtin:"):
        meta |= builtin.describe()
    _check_splits(meta, params)
    for name in SPLITS:
        pack.write_split(work, out / name, job.partitions, counts[name], spec)
    if job.labels is not None:
        (out / "labels.json").write_text(json.dumps(job.labels, ensure_ascii=False, indent=1), encoding="utf-8")
    if spec.task != "image":
        (out / "tokenizer.json").write_bytes((work / "tokenizer.json").read_bytes())
    (out / "card.md").write_text(card.render(meta), encoding="utf-8")


class _Runner:
    """Runs kernels on tasks of this run."""

    def __init__(self, runs_on: engine.Engine, work: Path, small: bool) -> None:
        self.engine, self.work = runs_on, work
        self.light = {"near", "settle"} if small else set()

    def each(self, kernel: str, tasks: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Results in the order of the tasks, as they come."""
        complete = [{"work": str(self.work.absolute()), **task} for task in tasks]
        with log.Progress(f"preprocess: {kernel}", len(tasks)) as progress:
            name = f"trainer.data.kernels:{kernel}"
            for number, result in enumerate(self.engine.run(name, complete, light=kernel in self.light), 1):
                progress.update(number)
                yield result

    def all(self, kernel: str, tasks: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """All results."""
        return list(self.each(kernel, tasks))


def _ingest(runner: _Runner, plan: list[chunks.Chunk], names: list[str], params: Params) -> tuple[int, Counter[str]]:
    """Read all chunks; returns the number of rows read and the numbers dropped by reason."""
    data = params.data
    encoding = "utf-8" if chunks.is_wide(data.encoding) else data.encoding
    tasks = [{"index": number, "chunk": chunk, "encoding": encoding} for number, chunk in enumerate(plan)]
    num_read = num_bad = 0
    dropped: Counter[str] = Counter()
    first = ""
    rows_of: Counter[int] = Counter()
    undecodable: Counter[int] = Counter()
    for chunk, result in zip(plan, runner.each("ingest", tasks), strict=True):
        num_read += result["read"]
        dropped.update(result["dropped"])
        name, bad = names[chunk["file"]], result["bad"]
        rows_of[chunk["file"]] += result["read"]
        undecodable[chunk["file"]] += result["dropped"].get(f"{_MALFORMED}encoding", 0)
        for line, message in bad[: max(_SHOWN_BAD - num_bad, 0)]:
            log.say(f"preprocess: {name}: line {line}: {message}")
        if bad and not first:
            first = f"{name}: line {bad[0][0]}: {bad[0][1]}"
        before, num_bad = num_bad, sum(number for reason, number in dropped.items() if reason.startswith(_MALFORMED))
        if num_bad > data.max_bad_rows:
            line, message = bad[data.max_bad_rows - before]
            raise _too_many(f"{name}: line {line}: {message}", first, dropped, data.max_bad_rows)
    for number, wrong in undecodable.items():
        # Some such rows are damaged rows, up to the limit; all of them mean that the file is in another encoding.
        if wrong and wrong == rows_of[number]:
            message = (
                f"{names[number]}: {wrong} of {rows_of[number]} rows are not {encoding.upper()}; the first: {first}"
            )
            raise DataError(message, "set data.encoding to the file's encoding, such as latin-1")
    if num_read == sum(dropped.values()):
        message = f"data.source: {data.source}: no row is left of {num_read} ({_reasons(dropped) or 'there are none'})"
        raise DataError(f"{message}; {first}" if first else message, "correct the rows, or relax data.clean")
    return num_read, dropped


def _too_many(where: str, first: str, dropped: Counter[str], allowed: int) -> DataError:
    kinds = Counter({kind: number for kind, number in dropped.items() if kind.startswith(_MALFORMED)})
    message = f"{where}; with it more than data.max_bad_rows={allowed} rows are malformed ({_reasons(kinds)})"
    if first != where:
        message += f"; the first is {first}"
    hint = "correct the rows, or raise data.max_bad_rows to count and drop them"
    if kinds[f"{_MALFORMED}encoding"] * 2 > kinds.total():
        hint = f"set data.encoding to the file's encoding, such as latin-1; or {hint}"
    return DataError(message, hint)


def _reasons(dropped: Counter[str]) -> str:
    return ", ".join(f"{reason.removeprefix(_MALFORMED)} {number}" for reason, number in sorted(dropped.items()))


def _choose(
    job: Job, work: Path, settled: list[dict[str, Any]], dropped: Counter[str], params: Params
) -> tuple[Job, dict[str, int]]:
    """Fix labels, row limits and split cuts; returns the completed job and the rows of each label."""
    data = params.data
    has_labels = params.task.name != "lm"
    counts: Counter[str] = Counter()
    for result in settled:
        counts.update(result["labels"])
    if has_labels:
        job = _with_labels(job, counts, dropped, data.min_label_rows)
    if data.max_rows and sum(counts.values()) > data.max_rows:
        job = _limited(job, work, data.max_rows, dropped)
        if has_labels:
            # Labels may have become rare; rows of those that go are not replaced.
            counts = Counter()
            for part in range(job.partitions):
                _, codes = kernels.selected(work, part, job, [])
                counts.update(job.labels[code] for code in codes.tolist())  # type: ignore[index]
            smaller = _with_labels(job, counts, dropped, data.min_label_rows)
            job = smaller.extended(limits=_recount(smaller, job, work))
    if not data.split.stratify or not has_labels:
        return job.extended(cuts=[split.uniform_cuts(data.split.val, data.split.test)]), dict(sorted(counts.items()))
    hashes, numbers = [], []
    for part in range(job.partitions):
        table, own = kernels.selected(work, part, job, ["hi", "lo"])
        hashes.append(split.split_hashes(kernels.ids_of(table), data.split.seed))
        numbers.append(own)
    joined, labels = np.concatenate(hashes), np.concatenate(numbers)
    labels = split.stratum_of_each(joined, labels)
    cuts = split.stratified_cuts(joined, labels, len(job.labels or []), data.split.val, data.split.test)
    return job.extended(cuts=cuts), dict(sorted(counts.items()))


def _with_labels(job: Job, counts: Counter[str], dropped: Counter[str], at_least: int) -> Job:
    """Drop rare labels from the counts; the job with the labels that stay."""
    different = len(counts)
    for label in [label for label, number in counts.items() if number < at_least]:
        dropped["rare_label"] += counts.pop(label)
    if len(counts) < 2:
        have = f"only the label {next(iter(counts))[:80]!r}" if counts else "no label"
        message = f"data.source: there is {have} with data.min_label_rows={at_least} rows or more, after cleaning"
        hint = "a classifier needs two labels: check data.label, or lower data.min_label_rows"
        if different > MANY_LABELS:
            message += f"; {different} labels are rarer"
            hint = "almost every row has a label of its own: data.label names a column of ids or of texts, name another"
        raise DataError(message, hint)
    return job.extended(labels=sorted(counts))


def _limited(job: Job, work: Path, max_rows: int, dropped: Counter[str]) -> Job:
    """Take the rows with the smallest content hashes; partitions are in that order."""
    limits, left = [], max_rows
    for part in range(job.partitions):
        _, codes = kernels.selected(work, part, job, [])
        limits.append(min(len(codes), left))
        dropped["over_max_rows"] += len(codes) - limits[-1]
        left -= limits[-1]
    return job.extended(limits=limits)


def _recount(smaller: Job, before: Job, work: Path) -> list[int]:
    """Limits of the same rows, now that some labels are gone."""
    limits = []
    for part in range(before.partitions):
        _, codes = kernels.selected(work, part, before, [])
        stay = set(smaller.labels or [])
        limits.append(sum((before.labels or [])[code] in stay for code in codes.tolist()))
    return limits


def _train_texts(job: Job, work: Path) -> Iterator[str]:
    """Texts of the train split, ordered by content hash (which is as good as drawn), as many as the tokenizer is trained on."""
    size, enough = 0, TOKENIZER_BYTES * job.config.tokenizer.vocab_size
    for part in range(job.partitions):
        table, codes = kernels.selected(work, part, job, ["hi", "lo", "text"])
        train = np.flatnonzero(kernels.splits_of(table, codes, job) == split.TRAIN)
        column = table.column("text")
        for row in train.tolist():
            text = column[row].as_py()
            size += len(text)
            yield text.decode()
            if size >= enough:
                return


def _spec_and_tokenizer(job: Job, work: Path, params: Params) -> tuple[Spec, bool]:
    """Train or read the tokenizer; returns the shape of the examples, and whether tiktoken may encode them."""
    data, task = params.data, params.task.name
    num_labels = len(job.labels or [])
    if task == "image":
        return Spec(task, 0, num_labels, 0, data.image_size, data.image_channels), False
    if data.tokenizer.path:
        content, vocab_size = tokenizer.read(storage.local_path(data.tokenizer.path))
    else:
        config = data.tokenizer
        content = tokenizer.train(
            _train_texts(job, work), config.vocab_size, lowercase=config.lowercase, prefix_space=config.prefix_space
        )
        vocab_size = len(json.loads(content)["model"]["vocab"])
    (work / "tokenizer.json").write_text(content, encoding="utf-8")
    sample = list(itertools.islice(_train_texts(job, work), 200))
    return Spec(task, vocab_size, num_labels, data.max_length), tokenizer.fast_agrees(content, sample)


def _check_splits(meta: dict[str, Any], params: Params) -> None:
    """Raises DataError when a split that was asked for is empty."""
    wanted = {"train": 1.0, "val": params.data.split.val, "test": params.data.split.test}
    for name, share in wanted.items():
        if share and not meta["rows"][name]:
            message = f"data.source: the {name} split is empty: only {meta['kept']} rows are left"
            raise DataError(message, "give more rows, or set data.split.stratify=true, which splits exactly")


def _sum(results: list[dict[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for result in results:
        total.update(result)
    return {key: total[key] for key in ("rows", "tokens", "bytes")}
