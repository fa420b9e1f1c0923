"""Checkpoints on disk: damage, crafted pickles, retention, foreign runs, full disks."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import random
import shutil
import time

import pytest
import torch

from trainer.artifacts import manifest
from trainer.errors import ArtifactError, StorageError
from trainer.parallel.group import Ranks
from trainer.train import dcp, retention
from trainer.train.checkpoint import Checkpoints
from trainer.train.state import rng_state


def tree(step: int) -> dict:
    return {"model": {"w": torch.full((50, 3), float(step))}, "optimizer": {"state": {0: {"m": torch.tensor(step)}}},
            "progress": {"step": step, "loss": 0.1 * step}}  # fmt: skip


def store(folder, keep=2, identity="run") -> Checkpoints:
    return Checkpoints(folder, keep, Ranks(), identity)


def save(folder, *steps, keep=2) -> None:
    for step in steps:
        store(folder, keep).save(step, tree(step), rng_state(torch.device("cpu")), durable=True)


def loaded_step(folder, **given) -> int | None:
    found = store(folder, **given).load()
    if found is None:
        return None
    content, rng = found
    step = content["progress"]["step"]
    assert torch.equal(content["model"]["w"], tree(step)["model"]["w"])
    assert content["optimizer"]["state"][0]["m"] == step
    assert rng is not None
    return step


def names(folder) -> list[str]:
    """What is in a folder, but for what was put aside."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("bad-"))


def test_newest_is_loaded_and_older_ones_beyond_the_limit_go(tmp_path):
    save(tmp_path, 10, 20, 30)
    assert loaded_step(tmp_path) == 30
    assert names(tmp_path) == ["step-000000020", "step-000000030"]


def test_nothing_there_is_no_checkpoint(tmp_path):
    assert store(tmp_path).load() is None
    assert store(None).load() is None


def damage(place, how, rng) -> None:
    file = rng.choice(sorted(path for path in place.iterdir() if path.is_file()))
    content = bytearray(file.read_bytes())
    if how == "flip":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
    elif how == "truncate":
        file.write_bytes(content[: rng.randrange(len(content))])
    else:
        file.unlink()


@pytest.mark.parametrize("how", ["flip", "truncate", "delete"])
def test_any_damage_is_found_reported_and_passed_over(how, tmp_path, capsys):
    save(tmp_path / "good", 10, 20)
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for number in range(12):
        place = tmp_path / str(number)
        shutil.copytree(tmp_path / "good", place)
        damage(place / "step-000000020", how, rng)
        assert loaded_step(place) == 10
        assert "step-000000020 passed over" in capsys.readouterr().out


def test_swapped_files_of_two_checkpoints_are_found(tmp_path):
    save(tmp_path, 10, 20)
    shutil.copyfile(tmp_path / "step-000000010" / "__0_0.distcp", tmp_path / "step-000000020" / "__0_0.distcp")
    assert loaded_step(tmp_path) == 10


def test_a_broken_newer_one_does_not_push_out_the_good(tmp_path):
    save(tmp_path, 10, 20, keep=1)
    # keep=1 leaves 20 only; a broken 30 must neither be loaded nor count.
    shutil.copytree(tmp_path / "step-000000020", tmp_path / "step-000000030")
    (tmp_path / "step-000000030" / "state.json").write_text("{}")
    assert loaded_step(tmp_path) == 20
    save(tmp_path, 25, keep=1)
    assert loaded_step(tmp_path) == 25
    assert names(tmp_path) == ["step-000000025"]


def test_half_written_ones_are_swept(tmp_path):
    save(tmp_path, 10)
    shutil.copytree(tmp_path / "step-000000010", tmp_path / ".tmp-step-000000020")
    assert loaded_step(tmp_path) == 10
    assert names(tmp_path) == ["step-000000010"]


def test_another_runs_checkpoint_is_passed_over(tmp_path, capsys):
    save(tmp_path, 10)
    assert loaded_step(tmp_path, identity="other") is None
    assert "other parameters" in capsys.readouterr().out


class Crafted:
    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return (exec, (f"open({str(self.path)!r}, 'w').close()",))


def craft(place, trap, *, sealed: bool) -> None:
    (place / ".metadata").write_bytes(pickle.dumps(Crafted(trap)))
    if sealed:
        meta = manifest.read(place, verify=False).meta
        (place / "manifest.json").unlink()
        manifest.seal(place, retention.KIND, meta, {})


@pytest.mark.parametrize("sealed", [False, True])
def test_a_crafted_pickle_is_never_executed(sealed, tmp_path, capsys):
    save(tmp_path, 10, 20)
    trap = tmp_path / "trap"
    craft(tmp_path / "step-000000020", trap, sealed=sealed)
    if sealed:
        # Whoever can forge the manifest too is stopped by the unpickler.
        with pytest.raises(ArtifactError, match="exec, which DCP does not write"):
            loaded_step(tmp_path)
    else:
        assert loaded_step(tmp_path) == 10
        assert "step-000000020" in capsys.readouterr().out
    assert not trap.exists()


def test_one_that_is_whole_but_cannot_be_read_ends_the_run_and_stays(tmp_path):
    save(tmp_path, 10, 20)
    place = tmp_path / "step-000000020"
    meta = manifest.read(place).meta
    (place / ".metadata").write_bytes(b"\x80\x04nothing")
    (place / "manifest.json").unlink()
    manifest.seal(place, retention.KIND, meta, {})
    with pytest.raises(ArtifactError, match=r"step-000000020: is whole, but cannot be read: UnpicklingError"):
        loaded_step(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000010", "step-000000020"]


def test_one_of_a_newer_version_ends_the_run_and_stays(tmp_path, monkeypatch):
    save(tmp_path, 10)
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "FORMAT", manifest.FORMAT + 1)
        save(tmp_path, 20)
    with pytest.raises(ArtifactError, match="format 2"):
        loaded_step(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000010", "step-000000020"]


@pytest.mark.skipif(os.geteuid() != 0, reason="taking permissions away from oneself takes root")
@pytest.mark.parametrize("path", ["step-000000020/state.json", "step-000000020", "."])
def test_what_may_not_be_read_is_neither_corrupted_nor_put_aside(path, tmp_path):
    save(tmp_path, 10, 20)
    for folder in (tmp_path, *tmp_path.parents):
        folder.chmod(folder.stat().st_mode | 0o755)
    (tmp_path / path).chmod(0o000)
    os.seteuid(65534)
    try:
        with pytest.raises(StorageError, match="Permission denied"):
            loaded_step(tmp_path)
    finally:
        os.seteuid(0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000010", "step-000000020"]


DCP = "torch.distributed.checkpoint.metadata"


@pytest.mark.parametrize(
    ("module", "name"),
    [(DCP, "os"), (DCP, "torch"), (DCP, "dataclass"), (DCP, "field"), (DCP, "Any"), (DCP, "os.system"), ("torch", "load"),
     ("pathlib", "PosixPath"), ("builtins", "eval")],
)  # fmt: skip
def test_the_unpickler_knows_only_what_dcp_writes(module, name):
    crafted = b"c" + module.encode() + b"\n" + name.encode() + b"\n."
    with pytest.raises(pickle.UnpicklingError, match="does not write"):
        dcp._Unpickler(io.BytesIO(crafted)).load()


def taken(kind: str, name: str) -> bytes:
    """A pickle of `getattr(DCP's kind, name)`."""
    return f"cbuiltins\ngetattr\n(c{DCP}\n{kind}\nV{name}\ntR.".encode()


def test_members_of_enums_are_read_as_python_3_11_0_to_3_11_3_write_them():
    kind = "_MEM_FORMAT_ENCODING"
    assert dcp._Unpickler(io.BytesIO(taken(kind, "TORCH_PRESERVE_FORMAT"))).load().name == "TORCH_PRESERVE_FORMAT"


@pytest.mark.parametrize(
    ("kind", "name"), [("Metadata", "__init__"), ("_MEM_FORMAT_ENCODING", "__class__"), ("_MEM_FORMAT_ENCODING", "mro")]
)
def test_no_other_attribute_is_taken(kind, name):
    with pytest.raises((pickle.UnpicklingError, LookupError)):
        dcp._Unpickler(io.BytesIO(taken(kind, name))).load()


def test_the_metadata_names_no_path_of_this_machine(tmp_path):
    save(tmp_path, 10)
    content = (tmp_path / "step-000000010" / ".metadata").read_bytes()
    words = {word for _, word, _ in pickletools.genops(content) if isinstance(word, str)}
    assert "/model/w" in words
    names = {word for word in words if word.startswith(("/model/", "/optimizer/"))}
    assert [word for word in words - names if "/" in word] == []
    assert not words & set(tmp_path.parts)
    assert not {word for word in words if "pathlib" in word}


def test_full_or_closed_disk_is_a_storage_error_and_leaves_the_older_one(tmp_path, monkeypatch):
    save(tmp_path, 10)

    def refuse(*_, **__):
        raise OSError(28, "No space left on device", str(tmp_path / "x"))

    monkeypatch.setattr(manifest, "seal", refuse)
    with pytest.raises(StorageError, match="No space left"):
        save(tmp_path, 20)
    monkeypatch.undo()
    assert loaded_step(tmp_path) == 10
    assert names(tmp_path) == ["step-000000010"]


def test_saves_are_held_back_to_a_share_of_the_time(tmp_path):
    kept = store(tmp_path)
    assert kept.due()
    kept.save(10, tree(10), {}, durable=True)
    assert not kept.due()
    kept._last_end -= 1000.0
    assert kept.due()
    assert not store(None).due()


def test_the_same_step_is_not_written_twice(tmp_path):
    kept = store(tmp_path)
    kept.save(10, tree(10), {}, durable=True)
    before = (tmp_path / "step-000000010" / "manifest.json").stat().st_ino
    kept.save(10, tree(10), {}, durable=True)
    assert (tmp_path / "step-000000010" / "manifest.json").stat().st_ino == before


def test_the_best_stays_beside_the_newest(tmp_path):
    kept = store(tmp_path, keep=1)
    for step, best in ((10, True), (20, False), (30, True), (40, False), (50, False)):
        kept.save(step, tree(step), {}, durable=True, best=best)
    assert names(tmp_path) == ["step-000000030", "step-000000050"]


def test_what_was_put_aside_goes_with_a_good_save_but_not_at_once(tmp_path):
    save(tmp_path, 10, 20)
    (tmp_path / "step-000000020" / "state.json").write_text("{}")
    assert loaded_step(tmp_path) == 10
    (bad,) = tmp_path.glob("bad-step-000000020.*")
    save(tmp_path, 30)
    assert bad.exists()
    bad.rename(bad.with_suffix(f".{int(time.time() - retention.ASIDE_S - 1)}"))
    assert loaded_step(tmp_path) == 30
    assert list(tmp_path.glob("bad-*"))
    save(tmp_path, 40)
    assert not list(tmp_path.glob("bad-*"))


def test_removal_happens_under_another_name(tmp_path, monkeypatch):
    save(tmp_path, 10, 20)
    seen = []
    monkeypatch.setattr(retention.storage, "remove", lambda path: seen.append(path.name))
    retention.prune(tmp_path, 1, False)
    assert names(tmp_path)[1:] == ["step-000000020"]
    assert [name.startswith(".old-step-000000010-") for name in seen] == [True, True]
    monkeypatch.undo()
    assert loaded_step(tmp_path) == 20
    assert names(tmp_path) == ["step-000000020"]
