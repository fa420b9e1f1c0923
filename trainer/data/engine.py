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
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from trainer import plugins
from trainer.cores import num_cores
from trainer.errors import ConfigError, DataError, MillraceError, StorageError
from trainer.storage import explained

if TYPE_CHECKING:
    from concurrent.futures import ProcessPoolExecutor

# Below this many bytes of raw data starting worker processes costs more than they save.
SMALL_BYTES = 32 << 20
# The same for kernels that only sort and copy, which run on threads of this process.
LIGHT_BYTES = 1 << 30


# What a worker may report; exceptions themselves do not pass between processes unchanged.
_ERRORS: dict[str, type[MillraceError]] = {kind.__name__: kind for kind in (ConfigError, DataError, StorageError)}


def num_workers(workers: int) -> int:
    """The number of worker processes: as asked for, or one per core that this process may use."""
    return workers or num_cores()


def call(kernel: str, task: str) -> str:
    """Run a kernel on a task, both as JSON text. An error for the user becomes {"error": [class, message, hint]}."""
    try:
        given = json.loads(task)
        # Errors that name no file: of a write to a disk that is full.
        with explained(f"preprocess: work folder {given.get('work', '')}"):
            return json.dumps(plugins.load(kernel)(given))
    except MillraceError as error:
        return json.dumps({"error": [type(error).__name__, error.message, error.hint]})


class Engine:
    """Runs kernels; a context manager, because a process pool lives through all kernels of a run.

    Args:
        name: inline, pool, daft or ray.
        workers: worker processes, 0 for one per core (ignored by inline).
    """

    def __init__(self, name: str, workers: int) -> None:
        self.name, self.workers = name, num_workers(workers)
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def run(self, kernel: str, tasks: Sequence[dict[str, Any]], *, light: bool = False) -> Iterator[dict[str, Any]]:
        """The kernel's result for each task, in the order of the tasks.

        Args:
            kernel: `module:function`.
            tasks: JSON objects.
            light: run in this process all the same, on threads if the engine has workers.

        Raises:
            MillraceError: as the kernel raised it.
        """
        words = [json.dumps(task) for task in tasks]
        # A cluster may hold what this machine cannot; else one task gains nothing from another process.
        here = self.name == "inline" or (len(tasks) <= 1 and self.name != "ray")
        how = {"pool": self._on_pool, "daft": self._on_daft, "ray": self._on_ray}
        if here:
            results: Iterator[str] = map(partial(call, kernel), words)
        else:
            results = self._on_threads(kernel, words) if light else how[self.name](kernel, words)
        for text in results:
            result = json.loads(text)
            if "error" in result:
                name, message, hint = result["error"]
                raise _ERRORS.get(name, DataError)(message, hint)
            yield result

    def _on_threads(self, kernel: str, tasks: Sequence[str]) -> Iterator[str]:
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(self.workers) as pool:
            yield from pool.map(partial(call, kernel), tasks)

    def _on_pool(self, kernel: str, tasks: Sequence[str]) -> Iterator[str]:
        import multiprocessing
        from concurrent.futures import ProcessPoolExecutor

        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.workers, context, _watch_parent, (os.getpid(),))
        futures = [self._pool.submit(call, kernel, task) for task in tasks]
        for future in futures:
            yield future.result()

    def _on_daft(self, kernel: str, tasks: Sequence[str]) -> Iterator[str]:
        return _with_daft(min(self.workers, len(tasks)), kernel, tasks)

    def _on_ray(self, kernel: str, tasks: Sequence[str]) -> Iterator[str]:
        # Daft calls home on import without this; trainer/__init__.py sets it too, for whoever comes first.
        os.environ["DO_NOT_TRACK"] = "1"
        import daft

        with suppress(RuntimeError):  # the runner can be chosen once per process
            daft.set_runner_ray(os.environ.get("RAY_ADDRESS"))
        return _with_daft(self.workers, kernel, tasks)


def _watch_parent(parent: int) -> None:
    """End this worker when its parent is gone: a pool's workers would wait for ever after a kill -9."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _with_daft(workers: int, kernel: str, tasks: Sequence[str]) -> Iterator[str]:
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
