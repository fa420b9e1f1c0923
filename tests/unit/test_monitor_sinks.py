"""Where rows go: the live file over kill and resume, TensorBoard's bytes, trackers that fail or are slow."""

from __future__ import annotations

import json
import math
import struct
import threading
import time

import pytest

from tests.tiny import tiny_dataset
from trainer.config.load import load
from trainer.errors import ConfigError
from trainer.monitor import sinks, trackers
from trainer.monitor.sinks import LIVE, Background, Guarded, LiveFile
from trainer.monitor.tensorboard import TensorBoard, crc32c
from trainer.stage import execute
from trainer.train.fit import fit

WORDS = [
    "train.threads=1", "train.max_steps=12", "train.eval_every=4", "train.log_every=2", "train.batch_size=16",
    "train.checkpoint_every=1", "train.checkpoint_async=false", "model.name=ngram", "model.buckets=512", "model.dim=16",
]  # fmt: skip
TIMES = {"examples_per_s", "step_ms", "data_wait", "checkpoint_s", "peak_memory_mb"}


class Kept:
    """A sink that keeps what it gets."""

    def __init__(self):
        self.rows, self.resumed, self.closed = [], [], []

    def resume(self, step, evaluated):
        self.resumed.append((step, evaluated))

    def row(self, step, figures):
        self.rows.append((step, dict(figures)))

    def close(self, ok):
        self.closed.append(ok)


class Broken(Kept):
    def row(self, step, figures):
        raise OSError("no route to https://me:topsecret@tracker/api")


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return tiny_dataset(tmp_path_factory.mktemp("data") / "d", "classify", rows=120)


def test_rows_after_the_checkpoint_and_half_a_line_are_cut_off(tmp_path):
    live = LiveFile(tmp_path / LIVE)
    for step in (2, 4):
        live.row(step, {"train_loss": 1.0 / step})
        live.row(step, {"val_loss": 2.0 / step})
    live.close(False)
    with open(tmp_path / LIVE, "ab") as file:
        file.write(b'{"step": 6, "train_')
    whole = lines_of(tmp_path)
    LiveFile(tmp_path / LIVE).resume(4, 4)
    assert lines_of(tmp_path) == whole[:4]
    LiveFile(tmp_path / LIVE).resume(4, 2)  # the evaluation at step 4 comes again
    assert lines_of(tmp_path) == whole[:3]
    LiveFile(tmp_path / LIVE).resume(0, -1)
    assert lines_of(tmp_path) == []


def lines_of(folder):
    return (folder / LIVE).read_text(encoding="utf-8").splitlines()


def test_figures_that_json_does_not_have_are_null(tmp_path):
    live = LiveFile(tmp_path / LIVE)
    live.row(1, {"a": math.inf, "b": math.nan, "c": 1.5})
    live.close(True)
    assert lines(tmp_path / LIVE) == [{"step": 1, "a": None, "b": None, "c": 1.5}]


class Stopped(Exception):
    pass


@pytest.mark.parametrize("at", [1, 3, 4, 5, 9])
def test_the_live_file_of_a_killed_run_ends_with_the_rows_of_its_history(dataset, tmp_path, at, monkeypatch):
    from trainer import models, tasks
    from trainer.train import checkpoint

    monkeypatch.setattr(checkpoint, "SHARE", 1e9)  # save at each step
    params = load(None, WORDS)
    first, second = Kept(), Kept()

    def stop(step, *_):
        if step == at:
            raise Stopped

    def train(**more):
        task = tasks.build(params, dataset)
        return fit(params, task, models.build(params.model, dataset.spec), scratch=tmp_path, **more)

    with pytest.raises(Stopped):
        train(on_step=stop, sinks=[first])
    fitted = train(sinks=[second])
    rows = lines(tmp_path / "train" / LIVE)
    assert [{k: v for k, v in row.items() if k not in TIMES} for row in rows] == fitted.history
    assert all(set(row) >= TIMES for row in rows if "train_loss" in row)
    assert first.closed == [False]
    assert second.closed == [True]
    assert first.resumed == [(0, -1)]
    assert second.resumed[0][0] == at - 1


def test_a_broken_tracker_is_said_once_and_gets_no_more(capsys):
    kept, broken = Kept(), Broken()
    both = Guarded({"broken": broken, "kept": kept})
    for step in range(3):
        both.row(step, {"train_loss": 1.0})
    both.close(True)
    said = capsys.readouterr().out
    assert said.count("broken takes no more figures") == 1
    assert "topsecret" not in said
    assert [step for step, _ in kept.rows] == [0, 1, 2]
    assert kept.closed == [True]
    assert broken.closed == []


def test_a_tracker_that_hangs_holds_nothing_up(monkeypatch, capsys):
    monkeypatch.setattr(sinks, "PATIENCE_S", 0.05)
    monkeypatch.setattr(sinks, "BEHIND", 3)
    release, kept = threading.Event(), Kept()

    class Hanging(Kept):
        def row(self, step, figures):
            release.wait(60)
            kept.row(step, figures)

    slow = Background(Hanging())
    for step in range(50):
        slow.row(step, {})
    slow.close(True)
    assert "still behind" in capsys.readouterr().out
    release.set()


def test_rows_reach_a_tracker_in_order_and_before_the_end():
    kept = Kept()
    behind = Background(kept)
    behind.resume(0, -1)
    for step in range(200):
        behind.row(step, {"a": step})
    behind.close(False)
    assert [step for step, _ in kept.rows] == list(range(200))
    assert kept.closed == [False]


def test_a_missing_package_is_refused_with_what_to_install(monkeypatch):
    monkeypatch.setitem(trackers.PACKAGES, "wandb", ("no_such_package_here", "wandb"))
    with pytest.raises(ConfigError, match="pip install wandb"):
        trackers.check(load(None, ["monitor.trackers=[tensorboard,wandb]"]).monitor)


def test_a_tracker_that_cannot_open_ends_no_run(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    params = load(None, ["monitor.trackers=[tensorboard]", f"monitor.folder={tmp_path / 'file'}"])
    assert trackers.open_trackers(params, "train", None) == []
    assert "tensorboard takes no figures" in capsys.readouterr().out


def test_a_run_that_goes_on_keeps_its_identity(tmp_path):
    assert trackers._identity(tmp_path / "s") == trackers._identity(tmp_path / "s") != trackers._identity(None)


def test_crc32c_is_castagnolis():
    # RFC 3720, B.4
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA


def events(path):
    """(step, what) of each record of an event file, its checksums verified."""
    data, place, found = path.read_bytes(), 0, []
    while place < len(data):
        (length,) = struct.unpack_from("<Q", data, place)
        for start, size in ((place, 8), (place + 12, length)):
            crc = crc32c(data[start : start + size])
            masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
            assert struct.unpack_from("<I", data, start + size) == (masked,)
        found.append(fields(data[place + 12 : place + 12 + length]))
        place += length + 16
    return found


def fields(data):
    """Field number -> values of a protobuf message."""
    found, place = {}, 0

    def varint():
        nonlocal place
        value = shift = 0
        while True:
            byte = data[place]
            place += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while place < len(data):
        key = varint()
        kind = key & 7
        if kind == 0:
            value = varint()
        else:
            size = {1: 8, 5: 4}.get(kind) or varint()
            value = data[place : place + size]
            place += size
        found.setdefault(key >> 3, []).append(value)
    return found


def test_tensorboards_file_holds_each_figure_and_says_where_a_run_goes_on(tmp_path):
    board = TensorBoard(tmp_path)
    board.resume(299, 299)
    board.row(300, {"train_loss": 0.25, "huge": 1e300})
    board.close(True)
    (path,) = tmp_path.iterdir()
    first, start, row = events(path)
    assert first[3] == [b"brain.Event:2"]
    assert start[2] == [300]
    assert fields(start[7][0]) == {1: [1]}
    assert row[2] == [300]
    values = [fields(each) for each in fields(row[5][0])[1]]
    assert [each[1][0] for each in values] == [b"train_loss", b"huge"]
    assert struct.unpack("<f", values[0][2][0]) == (0.25,)


def test_tensorboard_itself_reads_it_and_drops_what_came_again(tmp_path):
    from tensorboard.backend.event_processing import event_accumulator as accumulator

    for resumed, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        board = TensorBoard(tmp_path)
        board.resume(resumed, -1)
        for step in steps:
            board.row(step, {"train_loss": step + resumed / 10})
        board.close(True)
    found = accumulator.EventAccumulator(str(tmp_path))
    found.Reload()
    rows = [(each.step, round(each.value, 3)) for each in found.Scalars("train_loss")]
    assert rows == [(1, 1.0), (2, 2.0), (3, 3.2), (4, 4.2)]


def test_mlflow_has_each_figure_once_over_a_resume_and_no_secret(tmp_path):
    import mlflow

    words = ["monitor.trackers=[mlflow]", f"monitor.folder={tmp_path}", "data.source=s3://me:topsecret@bucket/x.csv"]
    params = load(None, words)
    for rows in ((1, 2), (2, 3)):
        (tracker,) = trackers.open_trackers(params, "train", tmp_path / "scratch")
        tracker.resume(0, -1)
        for step in rows:
            tracker.row(step, {"train_loss": float(step)})
        tracker.close(True)
    client = mlflow.MlflowClient(tracking_uri=(tmp_path / "mlflow").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("millrace").experiment_id])
    assert [(each.step, each.value) for each in client.get_metric_history(run.info.run_id, "train_loss")] == [
        (1, 1.0), (2, 2.0), (3, 3.0)
    ]  # fmt: skip
    assert run.info.status == "FINISHED"
    assert run.data.params["train.lr"] == str(params.train.lr)
    assert not any(b"topsecret" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_wandb_offline_gets_the_rows(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    params = load(None, ["monitor.trackers=[wandb]", f"monitor.folder={tmp_path}"])
    (tracker,) = trackers.open_trackers(params, "train", None)
    tracker.row(7, {"train_loss": 0.5})
    tracker.close(True)
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    end = time.monotonic() + 60  # its own process writes the file
    while b"train_loss" not in file.read_bytes():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_trackers_change_nothing_of_the_model(dataset, tmp_path):
    digests = set()
    for name, extra in (("plain", []), ("tracked", ["monitor.trackers=[tensorboard]"])):
        params = load(None, [*WORDS, *extra, f"monitor.folder={tmp_path / 'tracking'}"])
        out = tmp_path / name
        execute("train", params, {"dataset": str(dataset.folder)}, {"model": str(out)})
        manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
        digests.add(manifest["digest"])
        assert not TIMES & {key for row in lines(out / "history.jsonl") for key in row}
    assert len(digests) == 1
    (path,) = (tmp_path / "tracking").glob("train-*/*")
    names = {fields(each)[1][0] for event in events(path) if 5 in event for each in fields(event[5][0])[1]}
    assert {b"train_loss", b"val_accuracy", b"examples_per_s", b"lr", b"grad_norm"} <= names
