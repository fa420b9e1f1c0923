"""The stage contract: ports, verified inputs, published outputs, gates, records, remote folders."""

import json
import threading
from dataclasses import replace

import pytest

from tests import s3, toy
from trainer import stage as contract
from trainer import storage
from trainer.artifacts import manifest
from trainer.config.load import load
from trainer.errors import ArtifactError, ConfigError, DataError, GateRefused, StorageError
from trainer.stage import STAGES, execute


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    toy.register(monkeypatch)
    monkeypatch.delenv("TOY", raising=False)


@pytest.fixture
def source(tmp_path):
    return toy.make(tmp_path / "source")


def call(tmp_path, inputs=None, outputs=None, params=None, scratch=""):
    inputs = {"source": tmp_path / "source"} if inputs is None else inputs
    outputs = {"made": tmp_path / "out/made", "notes": tmp_path / "out/notes"} if outputs is None else outputs
    as_text = [{name: str(uri) for name, uri in ports.items()} for ports in (inputs, outputs)]
    return execute("toy", params or load(None), *as_text, scratch)


def test_outputs_are_published_with_their_records(tmp_path, source):
    result = call(tmp_path, params=load(None, ["train.lr=0.5"]))
    assert result.metrics["accuracy"] == 0.5
    made = manifest.read(tmp_path / "out/made", "model")
    record = made.record
    assert record["stage"] == "toy"
    assert record["params"]["train"]["lr"] == 0.5
    assert set(record["params"]) == {"data", "train"}
    assert record["inputs"] == {"source": manifest.read(source).digest}
    assert record["data_version"] == "d41d8"
    assert record["metrics"] == {"accuracy": 0.5, "perplexity": None}
    assert record["versions"]["millrace"]
    assert record["seconds"] > 0
    assert record["peak_memory_bytes"] > 1 << 20
    assert {"system", "machine", "cores"} <= set(record["host"])
    assert set(record) >= {"git_commit", "started"}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["made", "notes"]


def test_equal_inputs_and_parameters_give_equal_digests_elsewhere(tmp_path, source):
    digests = set()
    for name in ("a", "b"):
        call(tmp_path, outputs={"made": tmp_path / name / "made", "notes": tmp_path / name / "notes"})
        digests.add((manifest.read(tmp_path / name / "made").digest, manifest.read(tmp_path / name / "notes").digest))
    assert len(digests) == 1
    call(tmp_path, params=load(None, ["train.lr=0.5"]))
    assert manifest.read(tmp_path / "out/made").digest not in {made for made, _ in digests}


def test_the_data_version_is_handed_down(tmp_path, source):
    call(tmp_path)
    again = toy.make(tmp_path / "next", meta={"rows": 1})
    inputs = {"source": again, "extra": tmp_path / "out/made"}
    call(tmp_path, inputs, {"made": tmp_path / "x", "notes": tmp_path / "y"})
    assert manifest.read(tmp_path / "x").record["data_version"] == "d41d8"


PORTS = {
    "unknown input": ({"sauce": "x"}, None, "--in sauce: no such name; did you mean 'source'?"),
    "unknown output": (None, {"made": "a", "note": "b"}, "--out note: no such name; did you mean 'notes'?"),
    "missing input": ({}, None, "--in source=URI is missing"),
    "missing output": (None, {"made": "a"}, "--out notes=URI is missing"),
    "no ports": ({}, {}, "missing"),
}


@pytest.mark.parametrize("case", PORTS)
def test_ports_are_checked_before_anything_else(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    inputs, outputs, message = PORTS[case]
    with pytest.raises(ConfigError) as caught:
        call(tmp_path, inputs, outputs)
    assert message in caught.value.message
    assert list(tmp_path.iterdir()) == []


OVERLAPS = {
    "output is the input": ("out/source", "out/notes"),
    "output in the input": ("out/source/made", "out/notes"),
    "output around the input": ("out", "notes"),
    "one output": ("made", "made"),
    "one in the other": ("made", "made/notes"),
    "the same by another spelling": ("out/../out/source/.", "notes"),
}


@pytest.mark.parametrize("case", OVERLAPS)
def test_outputs_that_would_replace_an_input_or_each_other_are_refused(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    source = toy.make(tmp_path / "out/source")
    made, notes = OVERLAPS[case]
    with pytest.raises(ConfigError, match="overlaps"):
        call(tmp_path, {"source": "out/source"}, {"made": made, "notes": notes})
    manifest.read(source, "dataset")


def test_an_output_behind_a_link_to_the_input_is_refused(tmp_path, source):
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(ConfigError, match="overlaps"):
        call(tmp_path, None, {"made": tmp_path / "link", "notes": tmp_path / "notes"})


def test_relative_paths_and_file_uris_are_accepted(tmp_path, source, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call(tmp_path, {"source": "source"}, {"made": "made", "notes": f"file://{tmp_path}/notes"})
    manifest.read(tmp_path / "made", "model")
    manifest.read(tmp_path / "notes", "notes")


def test_a_corrupted_input_is_refused_by_its_file(tmp_path, source):
    path = source / "sub/b.txt"
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    with pytest.raises(ArtifactError) as caught:
        call(tmp_path)
    assert str(path) in caught.value.message
    assert caught.value.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_inputs_of_another_kind_missing_or_incomplete_are_refused(tmp_path, source):
    model = toy.make(tmp_path / "model", "model")
    with pytest.raises(ArtifactError, match="holds a model, a dataset is needed"):
        call(tmp_path, {"source": model})
    with pytest.raises(StorageError, match="no such file or folder"):
        call(tmp_path, {"source": tmp_path / "nowhere"})
    (source / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match=r"not a complete artifact"):
        call(tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_refusing_gate_publishes_all_the_same(tmp_path, source, monkeypatch):
    monkeypatch.setenv("TOY", "refuse")
    with pytest.raises(GateRefused, match="not better than the champion") as caught:
        call(tmp_path)
    assert caught.value.exit_code == 4
    assert caught.value.metrics["accuracy"] == 0.5
    manifest.read(tmp_path / "out/made", "model")
    assert not (tmp_path / "out/.scratch").exists()


def test_a_failed_stage_leaves_old_outputs_and_its_scratch(tmp_path, source, monkeypatch):
    call(tmp_path)
    before = manifest.read(tmp_path / "out/made").digest
    monkeypatch.setenv("TOY", "fail")
    with pytest.raises(DataError, match=r"rows\.csv:3"):
        call(tmp_path)
    assert manifest.read(tmp_path / "out/made").digest == before
    assert len(list((tmp_path / "out/.scratch").iterdir())) == 1
    monkeypatch.delenv("TOY")
    call(tmp_path)
    assert (tmp_path / "out/notes/attempts.txt").read_text() == "xx"


def test_a_bug_in_a_stage_is_not_explained_away(tmp_path, source, monkeypatch):
    monkeypatch.setenv("TOY", "missing")
    with pytest.raises(FileNotFoundError):
        call(tmp_path)


def test_an_explicit_scratch_is_used_and_others_in_it_are_left(tmp_path, source):
    (tmp_path / "scratch/other").mkdir(parents=True)
    call(tmp_path, scratch=str(tmp_path / "scratch"))
    assert [path.name for path in (tmp_path / "scratch").iterdir()] == ["other"]


def test_secrets_are_neither_recorded_nor_shown(tmp_path, source):
    params = load(None, ["data.source=s3://AKIA:top/secret@bucket/rows.csv"])
    call(tmp_path, params=params)
    text = (tmp_path / "out/made/manifest.json").read_text()
    assert "secret" not in text
    assert "s3://***@bucket/rows.csv" in text
    for uri in ("s3://AKIA:topsecret@bucket/x", "memory://user:topsecret@x/y", "s3://topsecret@bucket/x"):
        with pytest.raises(StorageError) as caught:
            call(tmp_path, {"source": uri})
        assert "topsecret" not in str(caught.value)


@pytest.fixture(scope="module")
def bucket():
    with s3.bucket("stages") as uri:
        yield uri


@pytest.fixture
def memory():
    import fsspec

    yield "memory://stages"
    fsspec.filesystem("memory").store.clear()


@pytest.fixture(params=["memory", "bucket"])
def remote(request, tmp_path):
    return f"{request.getfixturevalue(request.param)}/{tmp_path.name}"


def test_remote_folders_make_the_round_trip(tmp_path, source, remote):
    storage.send(source, f"{remote}/source")
    outputs = {"made": f"{remote}/made", "notes": f"{remote}/notes/"}
    for lr in (0.5, 0.25):
        call(
            tmp_path, {"source": f"{remote}/source"}, outputs, load(None, [f"train.lr={lr}"]), str(tmp_path / "scratch")
        )
        folder = storage.fetch(f"{remote}/made", tmp_path / str(lr))
        assert manifest.read(folder, "model").record["params"]["train"]["lr"] == lr
        assert (folder / "lr.txt").read_text() == str(lr)
        assert (folder / "sub/b.txt").read_bytes() == b"text\n"
        manifest.read(storage.fetch(f"{remote}/notes", tmp_path / f"n{lr}"), "notes")
    call(tmp_path, {"source": f"{remote}/made".replace("made", "source"), "extra": f"{remote}/made"})


def test_files_of_an_older_remote_artifact_are_removed(tmp_path, remote):
    storage.send(toy.make(tmp_path / "old", files={"only-old": b"1", "both": b"1"}), f"{remote}/x")
    new = toy.make(tmp_path / "new", files={"both": b"2", "only-new": b"2"})
    storage.send(new, f"{remote}/x")
    folder = storage.fetch(f"{remote}/x", tmp_path / "cache")
    assert manifest.read(folder).digest == manifest.read(new).digest


def test_a_remote_folder_whose_sending_was_killed_is_not_accepted(tmp_path, source, remote, monkeypatch):
    storage.send(source, f"{remote}/source")
    fs, _ = storage.filesystem(remote)
    real = fs.put_file
    sent = []

    def dying(local, target):
        if len(sent) == 2:
            raise KeyboardInterrupt
        sent.append(target)
        real(local, target)

    other = toy.make(tmp_path / "other", files={"a.bin": b"1", "c": b"2", "d": b"3"})
    with monkeypatch.context() as patch:
        patch.setattr(fs, "put_file", dying)
        with pytest.raises(KeyboardInterrupt):
            storage.send(other, f"{remote}/source")
    with pytest.raises(ArtifactError, match="not a complete artifact"):
        call(tmp_path, {"source": f"{remote}/source"})


def test_a_corrupted_remote_input_is_refused(tmp_path, source, remote):
    storage.send(source, f"{remote}/source")
    fs, path = storage.filesystem(f"{remote}/source/a.bin")
    fs.pipe_file(path, b"\1" + bytes(range(1, 256)))
    with pytest.raises(ArtifactError, match=r"a\.bin: corrupted"):
        call(tmp_path, {"source": f"{remote}/source"})


def test_what_another_process_sent_is_seen_although_listings_are_cached(tmp_path, source, bucket):
    import fsspec

    uri = f"{bucket}/{tmp_path.name}"
    fs, path = storage.filesystem(uri)
    fs.pipe_file(f"{path}/first", b"1")
    assert len(fs.ls(path)) == 1
    fsspec.filesystem("s3", skip_instance_cache=True).pipe_file(f"{path}/second/file", b"2")
    assert len(fs.ls(path)) == 1, "nothing is cached: the test shows nothing"
    assert (storage.fetch(f"{uri}/second", tmp_path / "cache") / "file").read_bytes() == b"2"


def test_missing_remote_folders_and_buckets_are_explained(tmp_path, source, remote):
    with pytest.raises(StorageError, match="nothing there"):
        call(tmp_path, {"source": f"{remote}/nowhere"})
    if remote.startswith("s3"):
        with pytest.raises(StorageError, match="no-such-bucket"):
            call(tmp_path, None, {"made": "s3://no-such-bucket/x", "notes": str(tmp_path / "notes")})
        with pytest.raises(StorageError, match="Bad_Bucket!"):
            call(tmp_path, {"source": "s3://Bad_Bucket!/x"})


def test_a_store_without_credentials_is_explained(tmp_path, source, bucket, monkeypatch):
    import fsspec

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(StorageError, match="credentials"):
        call(tmp_path, {"source": f"{bucket}/x"})
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def test_stages_in_threads_do_not_disturb_each_other(tmp_path, source):
    errors = []

    def work(number):
        try:
            call(tmp_path, None, {"made": tmp_path / f"{number}/made", "notes": tmp_path / f"{number}/notes"})
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert errors == []
    assert len({manifest.read(tmp_path / f"{number}/made").digest for number in range(4)}) == 1


def test_the_stage_table_is_consistent():
    kinds = {}
    for stage in STAGES.values():
        assert set(stage.sections) <= set(load(None).model_dump())
        assert set(stage.inputs) & set(stage.outputs) == set()
        for name, port in stage.outputs.items():
            kinds[name] = port.kind
        for name, port in stage.inputs.items():
            if stage.name != "toy":
                assert kinds[name] == port.kind, f"{stage.name} reads {name} as another kind than it is written"


def test_records_are_json(tmp_path, source):
    call(tmp_path)
    json.dumps(manifest.read(tmp_path / "out/made").record, allow_nan=False)


def test_scratch_is_the_same_for_other_ranks_threads_and_intervals():
    def fingerprint(*words):
        tree = load(None, list(words)).model_dump(mode="json")
        return contract._fingerprint("train", {name: tree[name] for name in contract.STAGES["train"].sections}, {})

    free = ["train.processes=2", "train.threads=3", "train.checkpoint_every=7", "train.keep_checkpoints=5",
            "train.log_every=3", "parallel.max_restarts=2"]  # fmt: skip
    assert {fingerprint(word) for word in free} == {fingerprint()}
    assert (
        len(
            {
                fingerprint(),
                fingerprint("train.lr=0.5"),
                fingerprint("train.batch_size=3"),
                fingerprint("train.accumulation=2"),
            }
        )
        == 4
    )


def test_every_free_parameter_is_one():
    tree = load(None).model_dump(mode="json")
    for section, names in contract.FREE.items():
        assert names <= set(tree[section])


def test_the_record_holds_the_sections_that_were_used(tmp_path, source, monkeypatch):
    monkeypatch.setattr(toy, "run", lambda call, run=toy.run: replace(run(call), params={"train": {"lr": 0.25}}))
    call(tmp_path, params=load(None, ["train.lr=0.5"]))
    record = manifest.read(tmp_path / "out/made").record
    assert record["params"]["train"] == {"lr": 0.25}
    assert record["params"]["data"]


@pytest.mark.parametrize(
    ("uri", "wanted"),
    [("foo://x/y", "Protocol not known"), ("s3://", "names no bucket"), ("ftp://127.0.0.1:9/x", "Connection refused")],
)
def test_an_output_that_cannot_be_reached_is_found_before_the_work(tmp_path, source, monkeypatch, uri, wanted):
    monkeypatch.setattr("tests.toy.run", lambda call: pytest.fail("the stage was run"))
    with pytest.raises(StorageError, match=wanted):
        call(tmp_path, outputs={"made": uri, "notes": tmp_path / "notes"})
    assert not (tmp_path / "notes").exists()
