"""A stage that does nothing, in a moment: `STUB="train=exit3 tune=sleep60"` makes stages fail or wait."""

import json
import os
import signal
import sys
import time
from pathlib import Path

SWITCHES = ("proceed", "tune", "distill", "quantize")


def leave(number: int, frame: object) -> None:
    print(f"{STAGE}: got signal {number}", flush=True)
    sys.exit(128 + number)


def surroundings() -> dict[str, str]:
    """What the kernel says that this process may do."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = dict(line.split(":\t", 1) for line in lines if line.startswith(("Cap", "NoNewPrivs", "Uid")))
    for folder in ("/", "/opt", "/usr/bin", "/tmp", "data", "registry"):
        try:
            (Path(folder) / "probe").write_text("x")
            (Path(folder) / "probe").unlink()
            found[folder] = "writable"
        except OSError as error:
            found[folder] = type(error).__name__ if error.errno != 30 else "read-only"
    return found


def main() -> int:
    given = json.loads(sys.argv[sys.argv.index("--executor-input") + 1])
    told = Path("data/deeds.csv")  # where there is no environment to say it
    text = told.read_text() if told.is_file() else os.environ.get("STUB", "")
    deeds = dict(word.split("=") for word in text.split())
    deed = deeds.get(STAGE, "")
    print(f"{STAGE}: working", flush=True)
    if deed.startswith("look"):
        print(json.dumps(surroundings()), flush=True)
    if deed.startswith(("sleep", "look")):
        deed = deed.replace("look", "sleep")
        time.sleep(float(deed[5:]))
    if deed.startswith("say"):
        print(f"{STAGE}: it is {os.environ[deed[3:]]}", flush=True)
    for name, place in given["outputs"].get("parameters", {}).items():
        path = Path(place["outputFile"])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(deeds.get(name, "true") if name in SWITCHES else "{}")
    artifacts = {}
    for port, found in given["outputs"].get("artifacts", {}).items():
        artifact = found["artifacts"][0]
        folder = Path(artifact["uri"])
        folder.mkdir(parents=True)
        (folder / "made").write_text(STAGE)
        if port == "promotion":
            (folder / "promotion.json").write_text(json.dumps({"decision": deeds.get("decide", "promoted")}))
        if port == "evaluation":
            (folder / "metrics.json").write_text('{"candidate": {"accuracy": 0.9}}')
        artifacts[port] = {"artifacts": [{**artifact, "metadata": {}}]}
    if deed.startswith("exit"):
        for number in range(20):
            print(f"{STAGE}: line {number}", flush=True)
        print(f"{STAGE}: about to fail", file=sys.stderr, flush=True)
        return int(deed[4:])
    output = Path(given["outputs"]["outputFile"])
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"artifacts": artifacts}))
    return 0


STAGE = sys.argv[1]
signal.signal(signal.SIGTERM, leave)
sys.exit(main())
