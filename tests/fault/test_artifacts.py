"""Publishing under kill -9, full and read-only disks, and two publishers at once: the old artifact, nothing or the new one."""

import errno
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.toy import make
from trainer import models, storage
from trainer.artifacts import manifest
from trainer.artifacts.dataset import Spec
from trainer.artifacts.publish import building
from trainer.config.load import validate
from trainer.errors import ArtifactError, StorageError

pytestmark = pytest.mark.fault

needs_mounts = pytest.mark.skipif(
    not sys.platform.startswith("linux") or os.geteuid() != 0,
    reason="mounting a small file system takes root on Linux",
)

PUBLISHER = """
import sys
from pathlib import Path
from trainer.artifacts import manifest
from trainer.artifacts.publish import building

number = int(sys.argv[2])
print("ready", flush=True)
while True:
    number += 1
    with building(Path(sys.argv[1])) as folder:
        for name in range(3):
            (folder / f"{name}.bin").write_bytes(bytes([number % 256]) * 20_000)
        manifest.seal(folder, "model", {"number": number}, {})
"""


def start(target, number=0):
    return subprocess.Popen(
        [sys.executable, "-c", PUBLISHER, str(target), str(number)], stdout=subprocess.PIPE, start_new_session=True
    )


def stop(process):
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=30)
    process.stdout.close()


def test_thirty_kills_leave_nothing_or_a_whole_artifact(tmp_path):
    target = tmp_path / "model"
    generator = random.Random(1)
    last = 0
    for _ in range(30):
        process = start(target, last)
        try:
            assert process.stdout.readline() == b"ready\n"
            time.sleep(generator.uniform(0.0, 0.2))
        finally:
            stop(process)
        if target.exists():
            found = manifest.read(target, "model")
            assert found.meta["number"] >= last, "an older artifact came back"
            last = found.meta["number"]
    assert last > 5, "the kills came before anything was published"
    with building(target) as folder:
        manifest.seal(folder, "model", {}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "what the killed processes left was not swept"


def test_a_manifest_never_becomes_durable_before_its_files(tmp_path):
    """A crash of the machine, not of the process: the files are synced before the manifest is written."""
    script = (
        "import os, sys; from pathlib import Path; from trainer.artifacts import manifest\n"
        "folder = Path(sys.argv[1]); synced = []; real = os.fsync\n"
        "def fsync(descriptor):\n"
        "    synced.append(os.path.basename(os.readlink(f'/proc/self/fd/{descriptor}')))\n"
        "    real(descriptor)\n"
        "os.fsync = fsync\n"
        "(folder / 'sub').mkdir(parents=True); (folder / 'sub' / 'a').write_bytes(b'x'); (folder / 'b').write_bytes(b'x')\n"
        "manifest.seal(folder, 'model', {}, {}); print(*synced)\n"
    )
    if not Path("/proc/self/fd").exists():
        pytest.skip("names of open files are read from /proc")
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "f")], capture_output=True, text=True, check=True, timeout=60
    )
    *before, written, parent = done.stdout.split()
    assert {"a", "b", "sub", "f"} <= set(before)
    assert written.startswith(".manifest.json")
    assert parent == "f"


def test_two_publishers_at_once_leave_a_whole_artifact(tmp_path):
    target = tmp_path / "model"
    first, second = start(target, 0), start(target, 100_000)
    reads = 0
    try:
        for process in (first, second):
            assert process.stdout.readline() == b"ready\n"
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            try:
                folder = os.open(target, os.O_RDONLY)
            except FileNotFoundError:
                continue
            # Through the descriptor, because by its name the next artifact may stand here in the middle of reading.
            try:
                manifest.read(f"/proc/self/fd/{folder}" if sys.platform == "linux" else target, "model")
                reads += 1
            except (ArtifactError, StorageError):
                # It was replaced and removed while it was read; what stands there now must be whole.
                pass
            finally:
                os.close(folder)
        assert (first.poll(), second.poll()) == (None, None), "a publisher failed"
    finally:
        stop(first)
        stop(second)
    assert reads > 0
    with building(target) as folder:
        manifest.seal(folder, "model", {}, {})
    manifest.read(target, "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@contextmanager
def mounted(folder, options):
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(folder)], check=True, timeout=30)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True, timeout=30)


def toy(todo, source, out, *words):
    environment = {**os.environ, "TOY": todo}
    command = [sys.executable, "-m", "tests.toy", "toy", "--in", f"source={source}", "--out", f"made={out}/made"]
    return subprocess.run(
        [*command, "--out", f"notes={out}/notes", *words],
        env=environment, capture_output=True, text=True, timeout=60, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip


def assert_refused(done, *words):
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "fix:" in done.stderr
    for word in words:
        assert word in done.stderr


@needs_mounts
def test_weights_that_find_no_room_are_explained_like_any_file(tmp_path):
    model, spec = torch.nn.Linear(1024, 1024), Spec("classify", 300, 2, 16)
    config = validate({"model": {"name": "ngram"}}).model
    with mounted(tmp_path / "disk", "size=1m") as disk:
        with pytest.raises(OSError, match="No space left on device") as error:
            models.save(disk / "model", model, config, spec, ["a", "b"], None, {})
        assert error.value.errno == errno.ENOSPC
        assert "model.safetensors" in str(error.value)
    with mounted(tmp_path / "disk", "size=1m,ro") as disk:
        storage.remove(disk / "never-there")


@needs_mounts
def test_a_full_disk_is_explained_and_leaves_nothing(tmp_path):
    source = make(tmp_path / "source")
    with mounted(tmp_path / "disk", "size=4m") as disk:
        done = toy("huge", source, disk / "out")
        assert_refused(done, "No space left on device", "free some space")
        assert [path.name for path in (disk / "out").iterdir() if path.name != ".scratch"] == []
        assert toy("write", source, disk / "out").returncode == 0
        digest = manifest.read(disk / "out" / "made", "model").digest
        assert_refused(toy("huge", source, disk / "out"), "No space left on device")
        assert manifest.read(disk / "out" / "made", "model").digest == digest


@needs_mounts
def test_a_disk_that_is_full_from_the_start_is_explained(tmp_path):
    source = make(tmp_path / "source")
    with mounted(tmp_path / "disk", "size=64k,nr_inodes=3") as disk:
        assert_refused(toy("write", source, disk / "out"), "No space left on device")
        assert not (disk / "out" / "made").exists()


@needs_mounts
def test_a_read_only_output_is_explained(tmp_path):
    source = make(tmp_path / "source")
    with mounted(tmp_path / "disk", "size=1m,ro") as disk:
        assert_refused(toy("write", source, disk / "out"), "Read-only file system", "not read-only")
    with mounted(tmp_path / "disk", "size=1m") as disk:
        assert toy("write", source, disk / "out").returncode == 0
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True, timeout=30)
        assert_refused(toy("write", source, disk / "out"), "Read-only file system")
        manifest.read(disk / "out" / "made", "model")


@needs_mounts
def test_scratch_and_outputs_may_be_on_different_file_systems(tmp_path):
    source = make(tmp_path / "source")
    (tmp_path / "out").mkdir()
    with mounted(tmp_path / "disk", "size=4m") as disk:
        (tmp_path / "out" / "made").symlink_to(disk / "made")
        done = toy("write", source, tmp_path / "out", "--scratch", str(disk / "scratch"))
        assert done.returncode == 0, done.stderr
        manifest.read(disk / "made", "model")
        assert (tmp_path / "out" / "made").is_symlink()
        assert not (disk / "scratch").exists()


def test_a_quota_is_explained(tmp_path):
    source = make(tmp_path / "source")
    assert_refused(toy("quota", source, tmp_path / "out"), "free some space")
    assert not (tmp_path / "out" / "made").exists()
