"""Container overhead: a stage in a container against the same stage as a process.

python benchmarks/container_overhead.py

Runs a stage with next to no work (preprocess of 200 rows) as a process on this machine and in the image `data`, which
must be present, by Docker or Podman over its API, hardened as in a pod. Starting and removing the container counts. Runs
alternate, so that a busy machine is equally unfair to both; medians are reported. Goal: at most 2 s.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from stage_overhead import RUNS, make_rows, process

from trainer import __version__

IMAGE = f"millrace/data:{__version__}"
WORDS = ["preprocess", "data.tokenizer.vocab_size=300"]


def container(engine: Any, source: Path, folder: Path) -> float:
    """Seconds of the stage in a container, from the request to start it until it is removed."""
    volumes = {str(source.parent): {"bind": str(source.parent), "mode": "rw"}}
    words = [*WORDS, f"data.source={source}", "--out", f"dataset={folder}"]
    start = time.perf_counter()
    running = engine.containers.run(
        IMAGE,
        words,
        detach=True,
        volumes=volumes,
        read_only=True,
        tmpfs={"/tmp": "rw,mode=1777"},
        cap_drop=["ALL"],
        security_opt=["no-new-privileges"],
        user="65532",
        network_mode="none",
    )
    try:
        code = running.wait(timeout=120)["StatusCode"]
        assert code == 0, running.logs().decode()
    finally:
        running.remove(force=True)
    return time.perf_counter() - start


def main() -> None:
    import docker

    try:
        engine = docker.from_env()
        engine.images.get(IMAGE)
    except docker.errors.DockerException as error:
        print(f"left out: {type(error).__name__}: no container engine, or no image {IMAGE}: make images")
        return
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        root.chmod(0o777)
        source = root / "rows.csv"
        make_rows(source)
        process(source, root / "warm-up")
        container(engine, source, root / "warm-up-container")
        pairs = [
            (process(source, root / f"process-{i}"), container(engine, source, root / f"container-{i}"))
            for i in range(RUNS)
        ]
    engine.close()
    overhead = statistics.median(b - a for a, b in pairs)
    print(f"{'':<28}{'median of ' + str(RUNS):>14}")
    print(f"{'stage as a process':<28}{statistics.median(pair[0] for pair in pairs):>12.3f} s")
    print(f"{'stage in a container':<28}{statistics.median(pair[1] for pair in pairs):>12.3f} s")
    print(f"{'overhead':<28}{overhead:>12.3f} s   goal <= 2 s: {'met' if overhead <= 2 else 'missed'}")


if __name__ == "__main__":
    main()
