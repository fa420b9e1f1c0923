"""One rank of a launch: `torchrun … --module trainer.train.worker PLACE`, started by `trainer.parallel.launch`."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from trainer import log, plugins, storage
from trainer.config.load import validate
from trainer.parallel import made, network, nodes
from trainer.parallel.agent import die_with
from trainer.parallel.arrivals import Unanswered
from trainer.parallel.launch import ARRIVALS, RESULT, SPEC, TRANSIENT, forget_error, read_errors, write_error
from trainer.stage import Call


def main(place: Path) -> int:
    """Train as PLACE/spec.json says; rank 0 writes PLACE/result.json. Returns the exit status."""
    die_with(os.getppid())
    rank = int(os.environ["RANK"])
    if rank:
        # Rank 0 speaks for all.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    # torchrun restarts ranks whatever ended them; an error that would come again is not worth another attempt.
    for error in read_errors(place).values():
        if error["kind"] not in TRANSIENT:
            return int(error["exit_code"])
    forget_error(place, rank)
    try:
        train(place, rank)
    except Exception as error:
        if isinstance(error, Unanswered) and error.last and rank == _speaker(error.last):
            # The launcher tells it only when torchrun has given the ranks that do not end half a minute.
            names = " and ".join(f"rank {each}" for each in error.last)
            print(f"{error.message}; it waited for {names}", file=sys.stderr, flush=True)
        return write_error(place, rank, error)
    return 0


def _speaker(last: list[int]) -> int:
    """The first rank that is not itself waited for."""
    return next(rank for rank in range(len(last) + 1) if rank not in last)


def train(place: Path, rank: int) -> None:
    """Join the process group, train, and leave the result."""
    from trainer.parallel.group import process_group
    from trainer.train.device import choose

    spec = json.loads((place / SPEC).read_text(encoding="utf-8"))
    params = validate(spec["params"], "params")
    inputs, outputs = ({name: Path(path) for name, path in spec[key].items()} for key in ("inputs", "outputs"))
    parallel = params.parallel
    device, several = choose(params.train.device), nodes.here().count > 1
    network.set_variables(parallel.nccl)
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    if device.type == "cuda" and rank == 0 and (problem := network.shared_memory_is_small(local)):
        log.say(problem)
    check = parallel.preflight == "on" or (parallel.preflight == "auto" and several)
    arrivals = None if several else place / ARRIVALS
    with process_group(parallel.backend, parallel.timeout_s, device, arrivals, check):
        result = plugins.load(spec["target"])(Call(params, inputs, outputs, Path(spec["scratch"])))
    if rank == 0:
        content, scratch = json.dumps(asdict(result)).encode(), Path(spec["scratch"])
        if several and outputs and not made.is_kept(scratch):
            try:
                made.keep(scratch, outputs, content)
            except OSError as error:  # it is for the case that this node is lost, nothing more
                log.say(f"{scratch}: no second copy of the model is kept there: {error}")
        storage.write_atomic(place / RESULT, content)


if __name__ == "__main__":
    status = main(Path(sys.argv[1]))
    # At once: threads of torch's that outlive the process group now and then abort an interpreter that takes itself
    # apart ("terminate called without an active exception"), and a rank that has done its work would count as failed.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
