"""Where kernels run: in this process, in a plain process pool, or in Daft, embedded or on a Ray cluster.

The one file that knows Daft. A kernel is a module-level function from a JSON object to a JSON object, named as
`module:function`; what is large passes through files in the work folder, which all workers see. So each engine gives
the same output, and memory is bounded by what one kernel holds.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from trainer import plugins
from trainer.errors import DataError

# Below this many bytes of raw data starting worker processes costs more than they save.
SMALL_BYTES = 16 << 20


def num_workers(workers: int) -> int:
    """The number of worker processes: as asked for, or one per usable core."""
    if workers:
        return workers
    with suppress(AttributeError):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def call(kernel: str, task: str) -> str:
    """Run a kernel on a task, both as JSON text. An error for the user becomes {"error": [message, hint]}."""
    try:
        return json.dumps(plugins.load(kernel)(json.loads(task)))
    except DataError as error:
        return json.dumps({"error": [error.message, error.hint]})


def run(engine: str, workers: int, kernel: str, tasks: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The kernel's result for each task, in the order of the tasks.

    Args:
        engine: inline, pool, daft or ray.
        workers: worker processes (ignored by inline).
        kernel: `module:function`.
        tasks: JSON objects.

    Raises:
        DataError: as the kernel raised it.
    """
    words = [json.dumps(task) for task in tasks]
    chosen = "inline" if engine == "inline" or (len(tasks) <= 1 and engine != "ray") else engine
    for text in _ENGINES[chosen](workers, kernel, words):
        result = json.loads(text)
        if "error" in result:
            raise DataError(*result["error"])
        yield result


def _inline(workers: int, kernel: str, tasks: Sequence[str]) -> Iterator[str]:
    return (call(kernel, task) for task in tasks)


def _watch_parent(parent: int) -> None:
    """End this worker when its parent is gone: a pool's workers would wait for ever after a kill -9."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _pool(workers: int, kernel: str, tasks: Sequence[str]) -> Iterator[str]:
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    context = multiprocessing.get_context("spawn")
    count = min(num_workers(workers), len(tasks))
    with ProcessPoolExecutor(count, context, initializer=_watch_parent, initargs=(os.getpid(),)) as pool:
        futures = [pool.submit(call, kernel, task) for task in tasks]
        try:
            for future in futures:
                yield future.result()
        finally:
            for future in futures:
                future.cancel()


def _daft(workers: int, kernel: str, tasks: Sequence[str]) -> Iterator[str]:
    return _with_daft(min(num_workers(workers), len(tasks)), kernel, tasks)


def _ray(workers: int, kernel: str, tasks: Sequence[str]) -> Iterator[str]:
    import daft

    with suppress(RuntimeError):  # the runner can be chosen once per process
        daft.set_runner_ray(os.environ.get("RAY_ADDRESS"))
    return _with_daft(num_workers(workers), kernel, tasks)


def _with_daft(workers: int, kernel: str, tasks: Sequence[str]) -> Iterator[str]:
    # Daft calls home on import without this; trainer/__init__.py sets it too, for whoever comes first.
    os.environ["DO_NOT_TRACK"] = "1"
    import daft

    class Kernel:
        def run(self, index: Any, task: Any) -> list[str]:
            return [f"{i} {call(kernel, t)}" for i, t in zip(index.to_pylist(), task.to_pylist(), strict=True)]

    Kernel.run = daft.method.batch(Kernel.run, return_dtype=daft.DataType.string(), batch_size=1)  # type: ignore[method-assign]
    remote = daft.cls(Kernel, use_process=True, max_concurrency=workers)()
    frame = daft.from_pydict({"index": list(range(len(tasks))), "task": list(tasks)})
    frame = frame.select(remote.run(daft.col("index"), daft.col("task")).alias("result"))
    waiting: dict[int, str] = {}
    following = 0
    for row in frame.iter_rows(results_buffer_size=None):
        index, _, text = str(row["result"]).partition(" ")
        waiting[int(index)] = text
        while following in waiting:
            yield waiting.pop(following)
            following += 1


_ENGINES: dict[str, Callable[[int, str, Sequence[str]], Iterator[str]]] = {
    "inline": _inline,
    "pool": _pool,
    "daft": _daft,
    "ray": _ray,
}
