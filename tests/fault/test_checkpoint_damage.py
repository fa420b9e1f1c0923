"""Damage of any file of a checkpoint is found and the one before it is taken; what is crafted runs nothing.

`make fault` draws a sample; all 1,000: `make fault FULL=1`, and a failure again with the SEED that it prints.
"""

from __future__ import annotations

import json
import random
import shutil

import pytest
import torch

from tests import grid
from tests.threads import together
from tests.traps import as_pickle, as_weights
from trainer.artifacts import manifest
from trainer.errors import ArtifactError
from trainer.parallel.group import Ranks
from trainer.train import retention
from trainer.train.checkpoint import Checkpoints

pytestmark = [pytest.mark.fault, pytest.mark.slow]

OLD, NEW = "step-000000010", "step-000000020"


def tree(step: int) -> dict:
    return {"t": {f"t{i}": torch.full((200 + i,), float(step * 10 + i)) for i in range(6)}, "step": step}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Two checkpoints of two ranks each."""
    folder = tmp_path_factory.mktemp("good")

    def save(ranks):
        files = {"model.json": b"{}"}
        with Checkpoints(folder, 2, ranks, "run", files=files) as kept:
            for step in (10, 20):
                kept.save(step, tree(step), {"rank": ranks.rank, "step": step}, durable=True)

    assert together(2, save) == [None, None]
    return folder


def damage(place, how: str, rng: random.Random) -> str:
    """Damage a checkpoint; returns what was done."""
    files = sorted(path for path in place.iterdir() if path.is_file())
    file = rng.choice(files)
    content = bytearray(file.read_bytes())
    if how == "flip":
        at, bit = rng.randrange(len(content)), rng.randrange(8)
        content[at] ^= 1 << bit
        file.write_bytes(content)
        return f"{file.name}: byte {at}, bit {bit}"
    if how == "truncate":
        size = rng.randrange(len(content))
        file.write_bytes(content[:size])
        return f"{file.name}: cut at {size}"
    if how == "missing":
        file.unlink()
        return f"{file.name}: removed"
    if how == "surplus":
        name = rng.choice(["__2_0.distcp", "rng-0002.json", "part-0001.json", "other/state.json"])
        (place / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(file, place / name)
        return f"{name}: a copy of {file.name}"
    if how == "duplicate":
        other = rng.choice([path for path in files if path.read_bytes() != content])
        shutil.copyfile(file, other)
        return f"{other.name}: now a copy of {file.name}"
    if how == "swap":
        other = rng.choice([path for path in files if path.read_bytes() != content])
        file.write_bytes(other.read_bytes())
        other.write_bytes(content)
        return f"{file.name} and {other.name}: swapped"
    names = [path.name for path in files if path.read_bytes() != (place.parent / OLD / path.name).read_bytes()]
    name = rng.choice(names)
    shutil.copyfile(place.parent / OLD / name, place / name)
    return f"{name}: of another step"


WAYS = ("flip", "flip", "flip", "truncate", "missing", "surplus", "duplicate", "swap", "older")


def test_all_damage_is_found_and_the_one_before_is_taken(good, tmp_path, capsys):
    seed, count = grid.seed(), grid.cases(100, 1000)
    rng = random.Random(seed)
    for number in range(count):
        place = tmp_path / str(number)
        shutil.copytree(good, place)
        done = damage(place / NEW, rng.choice(WAYS), rng)
        found = Checkpoints(place, 2, Ranks(), "run").load()
        said = capsys.readouterr().out
        assert found is not None, f"SEED={seed} case {number}: {done}"
        assert found[0]["step"] == 10, f"SEED={seed} case {number}: {done}"
        assert f"{NEW} passed over" in said
        assert [path.name for path in place.glob("step-*")] == [OLD]
        shutil.rmtree(place)
    print(f"SEED={seed}: {count} cases")


def crafted_state(trap) -> bytes:
    """Plain values that look like code for every reader of such things that there is."""
    payload = f"__import__('pathlib').Path({str(trap)!r}).touch()"
    items = [["__reduce__", {"tuple": ["exec", payload]}], ["!!python/object/apply:os.system", f"touch {trap}"],
             ["py/object", payload], ["{{" + payload + "}}", "${" + payload + "}"], ["t", {"tensor": payload}]]  # fmt: skip
    return json.dumps({"step": 20, "ranks": 2, "tree": {"dict": items}}).encode()


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize(
    ("name", "craft"),
    [
        (".metadata", as_pickle),
        ("__0_0.distcp", as_weights),
        ("state.json", crafted_state),
        ("state.json", as_pickle),
        ("rng-0000.json", as_pickle),
        ("manifest.json", as_pickle),
    ],
)
def test_a_crafted_checkpoint_runs_nothing(name, craft, sealed, good, tmp_path):
    trap, place = tmp_path / "canary", tmp_path / "run" / NEW
    shutil.copytree(good, place.parent)
    meta = manifest.read(place).meta
    (place / name).write_bytes(craft(trap))
    kept = Checkpoints(place.parent, 2, Ranks(), "run")
    if sealed and name == "rng-0000.json":
        # Another number of ranks than the one that saved does not read it.
        (place / "manifest.json").unlink()
        manifest.seal(place, retention.KIND, meta, {})
        assert kept.load()[0]["step"] == 20
    elif sealed and name != "manifest.json":
        # Whoever can forge the manifest too gets a refusal, and nothing is removed.
        (place / "manifest.json").unlink()
        manifest.seal(place, retention.KIND, meta, {})
        with pytest.raises(ArtifactError, match="is whole, but cannot be read"):
            kept.load()
        assert place.exists()
    else:
        assert kept.load()[0]["step"] == 10
    assert not trap.exists()
