"""Exception classes and the exit-code table: the one place that says what a stage's exit status means.

PyTorchJob's `restartPolicy: ExitCode` retries 128..255 and gives up on 1..127, so permanent errors are below 128 and
what is worth another try (130, Ctrl-C; 143, preempted after a durable checkpoint) is above.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_BAD_INPUT = 2
EXIT_DIVERGED = 3
EXIT_REFUSED = 4
EXIT_INTERRUPTED = 130
EXIT_PREEMPTED = 143

EXIT_CODES: dict[int, str] = {
    EXIT_OK: "done",
    EXIT_FAILURE: "an unexpected error: a bug, or the machine (see the traceback)",
    EXIT_BAD_INPUT: "bad configuration or data: the message names the field, file or row and the fix",
    EXIT_DIVERGED: "training diverged: a loss or gradient was not finite",
    EXIT_REFUSED: "a gate refused: the candidate was not promoted",
    EXIT_INTERRUPTED: "stopped by Ctrl-C: what is complete is kept, and the same command goes on",
    EXIT_PREEMPTED: "preempted after a durable checkpoint: run the same command again to resume",
}


_AFTER_URI = re.compile(r"[\s\"<>]")
_PORT = re.compile(r"\[.*\](:\d+)?|[^:\[]*:\d{1,5}")
_BUCKETS = ("s3", "s3a", "gs", "gcs", "minio", "oci")
# Their URIs name a container before the `@`.
_AZURE = ("abfs", "abfss", "wasb", "wasbs", "az", "adl")
_SECRETS = re.compile(
    r"(?i)([?&][\w.-]*(?:signature|credential|token|sig|key)="
    r"|(?<![\w.-])[\w.-]*(?:password|passwd|pwd|secret|(?:api|access|account)[_-]?(?:key|token))=)[^&\s'\"]+"
)


def redact(text: str) -> str:
    """The text without the passwords, keys, tokens and signatures of the URIs and of the `name=value` words in it."""
    before, *after = text.split("://")
    parts = [before]
    for part in after:
        scheme = parts[-1].lower()
        end = _end_of_credentials(re.split(r"[^a-z0-9+.-]", scheme)[-1], _AFTER_URI.split(part, maxsplit=1)[0])
        parts.append(f"***@{part[end:]}" if end else part)
    return _SECRETS.sub(r"\1***", "://".join(parts))


def _end_of_credentials(scheme: str, token: str) -> int:
    """Where the host begins in what follows `://`; 0 if nobody's name, password or token stands before it.

    A password may hold slashes and `@`, which no parser takes but people write: in doubt more is blanked than is secret.
    """
    authority = re.split(r"[/?#]", token, maxsplit=1)[0]
    last, at = token.rfind("@"), authority.rfind("@")
    if at < 0:
        # `user:pa/ss@host` is a password, `host:80/path@v2` and `host/path@v2` are none; a bucket has no port.
        is_host = ":" not in authority or (_PORT.fullmatch(authority) and scheme not in _BUCKETS)
        return 0 if is_host else last + 1
    if ":" not in authority[:at]:
        return 0 if scheme in _AZURE else at + 1
    host = authority[at + 1 :]
    return at + 1 if "." in host or host.startswith(("localhost", "[")) else last + 1


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


class OutOfMemory(MillraceError):
    """Memory was too short where ranks could not agree on taking less; another attempt begins with less."""

    # As the system's own killer has it: worth another try.
    exit_code = 128 + 9


class GateRefused(MillraceError):
    """The promotion gate refused the candidate; the message is its reason, `metrics` the figures it went by."""

    exit_code = EXIT_REFUSED

    def __init__(self, message: str, hint: str = "", metrics: Mapping[str, float] | None = None) -> None:
        super().__init__(message, hint)
        self.metrics = dict(metrics or {})


class Preempted(MillraceError):
    """SIGTERM arrived and a durable checkpoint was written; the same command resumes."""

    exit_code = EXIT_PREEMPTED
