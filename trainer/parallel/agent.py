"""torchrun as a child that cannot outlive its parent: `python -m trainer.parallel.agent PARENT_PID PLACE TORCHRUN_ARGS…`.

torchrun flattens every exit status of its workers to 1; this writes the real ones to PLACE/failures.json, a JSON object
from rank to exit status (negative: the number of the signal that ended the rank). In a pod that trains with others,
torchrun meets them in our lobby.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path

from trainer.errors import MillraceError

PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> None:
    """Have the system end this process when its parent, process `parent`, ends in whatever way."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    # The parent may have ended before the line above.
    if os.getppid() != parent:
        os._exit(128 + signal.SIGKILL)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(128 + signal.SIGKILL)


def main(argv: list[str]) -> int:
    """Run torchrun; returns its exit status."""
    parent, place, *arguments = argv
    die_with(int(parent))
    from trainer.parallel import launch, nodes

    if nodes.here().count > 1:
        from trainer.parallel.elastic import install

        install(Path(place))
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    # The launcher says what failed, once; torchrun's own report is a page of stack traces of torchrun.
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        torchrun(arguments)
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        (Path(place) / launch.FAILURES).write_text(json.dumps(codes), encoding="utf-8")
        return 1
    except MillraceError as error:
        launch.write_error(Path(place), launch.AGENT, error)
        return 1
    except SignalException as error:
        return 128 + error.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
