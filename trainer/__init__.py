"""millrace's stages: everything that runs inside a stage container; knows nothing of kfp, kubernetes or dvc.

Run a stage with `python -m trainer STAGE --params params.yaml --in NAME=URI --out NAME=URI [section.key=value ...]`.
"""

import os

__version__ = "0.1.0"

# Nothing phones home. Daft reads DO_NOT_TRACK while it is imported, so this must come before any import of it.
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# ONNX Runtime from 1.29 sends telemetry on Linux and macOS as well, from the moment it is imported, and writes a device
# id into the user's cache folder; only this variable prevents all of it.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
