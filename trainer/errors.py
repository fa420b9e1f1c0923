"""Exception classes and the exit-code table: the one place that says what a stage's exit status means.

PyTorchJob's `restartPolicy: ExitCode` retries 128..255 and gives up on 1..127, so permanent errors are below 128 and
what is worth another try (143, preempted after a durable checkpoint) is above.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_BAD_INPUT = 2
EXIT_DIVERGED = 3
EXIT_REFUSED = 4
EXIT_PREEMPTED = 143

EXIT_CODES: dict[int, str] = {
    EXIT_OK: "done",
    EXIT_FAILURE: "an unexpected error: a bug, or the machine (see the traceback)",
    EXIT_BAD_INPUT: "bad configuration or data: the message names the field, file or row and the fix",
    EXIT_DIVERGED: "training diverged: a loss or gradient was not finite",
    EXIT_REFUSED: "a gate refused: the candidate was not promoted",
    EXIT_PREEMPTED: "preempted after a durable checkpoint: run the same command again to resume",
}


# User and password in a URI. The keys of object stores may hold slashes, and their buckets never a colon.
_PASSWORDS = re.compile(r"(?i)((?:s3a?|gs|gcs|minio|oci)://)[^\s@:]*:[^\s@]+@|(://)[^\s/@:]*:[^\s/@]+@")
_SIGNATURES = re.compile(r"(?i)([?&][\w.-]*(?:signature|credential|token|secret|password|sig|key)=)[^&\s'\"]+")


def redact(text: str) -> str:
    """The text without the passwords, keys and signatures of the URIs in it."""
    if "://" not in text:
        return text
    return _SIGNATURES.sub(r"\1***", _PASSWORDS.sub(lambda found: f"{found[1] or found[2]}***@", text))


class MillraceError(ValueError):
    """An error a person can act on: `message` says what happened and where, `hint` what to do about it."""

    exit_code = EXIT_BAD_INPUT

    def __init__(self, message: str, hint: str = "") -> None:
        self.message = redact(message)
        self.hint = redact(hint)
        super().__init__(self.message)

    def __str__(self) -> str:
        return f"{self.message}\n  fix: {self.hint}" if self.hint else self.message


class ConfigError(MillraceError):
    """A parameter is unknown, of the wrong type or out of bounds; the message starts with its dotted path."""


class DataError(MillraceError):
    """Raw data cannot be used; the message names file, line or row."""


class ArtifactError(MillraceError):
    """A dataset, model or other artifact folder is missing, incomplete, corrupted or of the wrong kind."""


class StorageError(MillraceError):
    """A URI cannot be read or written: no such file, no permission, no space left, no driver installed."""


class DivergedError(MillraceError):
    """Training met a loss or gradient that is not finite."""

    exit_code = EXIT_DIVERGED


class GateRefused(MillraceError):
    """The promotion gate refused the candidate; the message is its reason, `metrics` the figures it went by."""

    exit_code = EXIT_REFUSED

    def __init__(self, message: str, hint: str = "", metrics: Mapping[str, float] | None = None) -> None:
        super().__init__(message, hint)
        self.metrics = dict(metrics or {})


class Preempted(MillraceError):
    """SIGTERM arrived and a durable checkpoint was written; the same command resumes."""

    exit_code = EXIT_PREEMPTED
