"""Names and labels of what we make on a cluster. The same output always gives the same name, so that a step that is
tried again finds the job that it started before.
"""

from __future__ import annotations

import hashlib
import re

from trainer.errors import ConfigError

MANAGER = "millrace"
JOB_LABEL = "millrace.dev/job"
RUN_LABEL = "millrace.dev/run"
SPEC_ANNOTATION = "millrace.dev/spec"
# Of a job that says it succeeded, though not all of its pods did.
REFUTED_ANNOTATION = "millrace.dev/refuted"

# Label values and the host names of pods end at 63 characters; Katib refuses Experiments with more than 40.
MAX_NAME = 63
MAX_EXPERIMENT = 40
_NAME = re.compile(r"[a-z]([a-z0-9-]*[a-z0-9])?")


def job_name(stage: str, key: str) -> str:
    """`millrace-train-0123456789`: at most 30 characters, the same for the same key.

    Args:
        stage: name of the stage.
        key: what the job makes, and nothing else does: the URI of its output.
    """
    return f"{MANAGER}-{stage}-{hashlib.sha256(key.encode()).hexdigest()[:10]}"


def check_name(name: str, suffix: str = "", limit: int = MAX_NAME) -> None:
    """Refuse a name that is no DNS label (RFC 1035), or is too long with what is put after it.

    Args:
        name: of an object.
        suffix: the longest that its controller appends for pods and services, such as `-worker-11`.
        limit: characters of name and suffix together.

    Raises:
        ConfigError: the name cannot be used.
    """
    if not _NAME.fullmatch(name):
        message = f"name {name!r} must be lower-case letters, digits and `-`, and begin with a letter"
        raise ConfigError(message, "give another --name")
    if len(name) + len(suffix) > limit:
        extra = f" with the {len(suffix)} that its pods append" if suffix else ""
        message = f"name {name!r} has {len(name)} characters{extra}, more than {limit}"
        raise ConfigError(message, f"give a --name of at most {limit - len(suffix)} characters")


def labels(stage: str, run: str = "") -> dict[str, str]:
    """Labels of an object and of its pods."""
    found = {
        "app.kubernetes.io/name": MANAGER,
        "app.kubernetes.io/managed-by": MANAGER,
        "app.kubernetes.io/component": stage,
    }
    return found | ({RUN_LABEL: label_value(run)} if run else {})


def label_value(text: str) -> str:
    """The text as the value of a label: at most 63 letters, digits, `-`, `_` and `.`, a letter or digit at both ends."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", text)[:MAX_NAME].strip("-_.")
