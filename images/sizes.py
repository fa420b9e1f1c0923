"""What the images weigh, as a Markdown table: `python images/sizes.py`, by Docker or Podman over its API.

An image is its base, the packages of its lock and the code. Packages that torch, torchao and torch.onnx require, at any
remove, count as torch's.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trainer import __version__

IMAGES = ("data", "trainer", "launcher")
MB = 1_000_000
# Run inside an image: bytes below /opt by group. Files that pip did not write are bytecode; they count with their source.
PROGRAM = r"""
import importlib.metadata as metadata, json, os, re
from pathlib import Path

def key(name):
    return re.sub(r"[-_.]+", "-", name).lower()

found = {key(each.name): each for each in metadata.distributions()}
reached, todo = set(), ["torch", "torchao", "onnxscript"]
while todo:
    name = todo.pop()
    if name in found and name not in reached:
        reached.add(name)
        todo += [key(re.match(r"[\w.-]+", each)[0]) for each in found[name].requires or () if "extra ==" not in each]
if "torch" in found:
    reached |= {name for name in found if name.startswith(("nvidia-", "cuda-"))}
owner = {os.path.normpath(each.locate_file(file)): name for name, each in found.items() for file in each.files or ()}
sizes = {"torch": 0, "packages": 0, "code": 0}
for folder, _, names in os.walk("/opt"):
    for name in names:
        path = Path(folder, name)
        source = path.parent.parent / (name.split(".")[0] + ".py") if path.suffix == ".pyc" else path
        package = owner.get(str(source), "")
        group = "torch" if package in reached else "code" if "/opt/millrace" in folder else "packages"
        sizes[group] += path.lstat().st_size
print(json.dumps(sizes))
"""


def measure(engine: Any, image: str) -> dict[str, int]:
    """Bytes of an image: `total`, and of it `base`, `torch`, `packages` and `code`."""
    name = f"millrace/{image}:{__version__}"
    words = ["-c", PROGRAM]
    text = engine.containers.run(name, words, entrypoint=["python"], remove=True, network_mode="none", read_only=True)
    sizes: dict[str, int] = json.loads(text)
    total = int(engine.images.get(name).attrs["Size"])
    return {"total": total, "base": total - sum(sizes.values()), **sizes}


def main() -> None:
    """Print the table."""
    import docker

    engine = docker.from_env()
    print("| image | MB | base | torch and its libraries | other packages | millrace |\n|---|---:|---:|---:|---:|---:|")
    for image in IMAGES:
        sizes = measure(engine, image)
        print(f"| {image} | " + " | ".join(f"{size / MB:,.1f}" for size in sizes.values()) + " |")
    engine.close()


if __name__ == "__main__":
    main()
