"""One rank of a group that saves and loads divided tensors: `run_ranks(shard_ranks.main, place)`.

Writes PLACE/rank-N.json: for each property whether it holds.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from trainer.errors import StorageError
from trainer.parallel.group import current, process_group
from trainer.train import writing
from trainer.train.checkpoint import Checkpoints

ROWS = 300_001  # of 4 values: 4.8 MB, and not the same number on both ranks


def whole(step: int) -> dict[str, torch.Tensor]:
    """The tensors as one process has them."""
    big = torch.arange(ROWS * 4, dtype=torch.float32).reshape(ROWS, 4) + step
    return {"rows": big, "columns": big[:6].clone(), "one": torch.tensor([[7.0 + step]]), "same": torch.full((9, 2), 1.0 * step),
            "plain": torch.arange(5) + step}  # fmt: skip


def placements() -> dict[str, list]:
    """How each is divided; `plain` is none."""
    return {"rows": [Shard(0)], "columns": [Shard(1)], "one": [Shard(0)], "same": [Replicate()]}


def bytes_read() -> int:
    """Of this process, so far."""
    return int(Path("/proc/self/io").read_text().split()[1])


def main(place: Path) -> None:
    """All cases, in one group."""
    results: dict[str, bool] = {}
    cpu = torch.device("cpu")
    with process_group("auto", 60.0, cpu):
        ranks = current(cpu)
        mesh = init_device_mesh("cpu", (ranks.size,))
        kinds = placements()

        def divided(step: int) -> dict[str, torch.Tensor]:
            return {
                name: distribute_tensor(value, mesh, kinds[name]) if name in kinds else value
                for name, value in whole(step).items()
            }

        # Collectives of training go on while the threads write.
        state = divided(10)
        with Checkpoints(place / "two", 2, ranks, "run") as kept:
            kept.save(10, {"t": state, "step": 10}, {"rank": ranks.rank})
            turns = 0
            while turns < 50 or any(ranks.gather(kept._writing is not None and kept._writing.busy())):
                total = torch.ones(1)
                dist.all_reduce(total)
                turns += 1
            for value in state.values():
                value.mul_(-1)
            kept.settle()
        results["collectives go on"] = total.item() == ranks.size

        def like(name: str, size: torch.Size, dtype: torch.dtype) -> torch.Tensor:
            kind = kinds.get(name.rsplit("/", 1)[-1])
            empty = torch.empty(size, dtype=dtype)
            return distribute_tensor(empty, mesh, kind) if kind else empty

        before = bytes_read()
        found, rng = Checkpoints(place / "two", 2, ranks, "run").load(like)
        read = bytes_read() - before
        results["the shards come back"] = all(
            torch.equal(value.full_tensor() if isinstance(value, DTensor) else value, whole(10)[name])
            for name, value in found["t"].items()
        )
        results["as shards"] = all(isinstance(found["t"][name], DTensor) for name in kinds)
        results["generators come back"] = rng == {"rank": ranks.rank}
        # Rank 0 also reads all for the digests.
        results["a rank reads no more than its shards"] = ranks.rank == 0 or read < 0.75 * ROWS * 16
        from_one, _ = Checkpoints(place / "one", 2, ranks, "run").load(like)
        results["of one process"] = torch.equal(from_one["t"]["rows"].full_tensor(), whole(20)["rows"])

        real = writing.Writing._write_share

        def refuse(self, rank):
            if rank == 1:
                raise OSError(28, "No space left on device", str(place))
            return real(self, rank)

        writing.Writing._write_share = refuse
        try:
            with Checkpoints(place / "two", 2, ranks, "run") as kept:
                kept.save(30, {"t": divided(30), "step": 30}, {}, durable=True)
        except StorageError as error:
            results["an error of one rank"] = "No space left" in error.message
        ranks.barrier()
        results["nothing half is left"] = [path.name for path in (place / "two").iterdir()] == ["step-000000010"]
    (place / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(results))
