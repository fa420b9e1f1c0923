"""The promotion gate: from figures to a decision and its reason, in words that a person can check."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from trainer.config import Promote


@dataclass(frozen=True)
class Gate:
    """A decision. `champion` is the version that the candidate was compared with; empty where there was none."""

    decision: str
    reason: str
    champion: str = ""
    alpha: float = 0.0

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def decide(
    promote: Promote,
    candidate: Mapping[str, Any],
    baseline: Mapping[str, Any] | None,
    champion: Mapping[str, Any] | None,
) -> Gate:
    """Promote, or refuse.

    Args:
        promote: section `promote`: significance level and limits.
        candidate: its figures; `bytes`, `latency_p50_ms` and `digest` are read.
        baseline: the comparison candidate - baseline with `name`; None if no baseline was fitted.
        champion: the comparison candidate - champion with `version` and `digest`, and `incomparable`, a reason, where
            they cannot be compared; None if there is no champion.
    """
    version = str(champion["version"]) if champion else ""

    def gate(decision: str, reason: str) -> Gate:
        return Gate(decision, reason, version, promote.alpha)

    if champion and champion["digest"] == candidate["digest"]:
        return gate("promoted", f"it is the champion already, {version}")
    if promote.max_bytes and candidate["bytes"] > promote.max_bytes:
        return gate("refused", f"{candidate['bytes']:,} bytes, the limit promote.max_bytes is {promote.max_bytes:,}")
    if promote.max_latency_ms and candidate["latency_p50_ms"] > promote.max_latency_ms:
        latency = f"{candidate['latency_p50_ms']:.3g} ms at batch 1"
        return gate("refused", f"{latency}, the limit promote.max_latency_ms is {promote.max_latency_ms:g} ms")
    if champion:
        if champion.get("incomparable"):
            return gate("refused", f"cannot be compared with champion {version}: {champion['incomparable']}")
        passed, words = better(champion, promote.alpha)
        return gate("promoted" if passed else "refused", f"{words} champion {version} on the champion's own test set")
    if baseline is None:
        reason = "there is no champion and no baseline to beat: set evaluate.baseline=true"
        return gate("refused", f"{reason}, or name the champion with `millrace registry promote`")
    passed, words = better(baseline, promote.alpha)
    return gate("promoted" if passed else "refused", f"no champion yet; {words} the baseline, {baseline['name']}")


def better(comparison: Mapping[str, Any], alpha: float) -> tuple[bool, str]:
    """Whether a comparison shows that the candidate is better at level `alpha`, and a phrase that ends in `than`."""
    metric = "bits_per_byte" if "bits_per_byte" in comparison else "accuracy"
    difference = comparison[metric]["value"]
    gain = -difference if metric == "bits_per_byte" else difference
    p_value = comparison["p_value"]
    size = f"{abs(difference):.4f} bits per byte" if metric == "bits_per_byte" else f"{100 * abs(gain):.2f} points"
    p_text = "p < 0.0001" if p_value < 1e-4 else f"p = {p_value:.4f}"
    if gain > 0 and p_value < alpha:
        return True, f"{size} better ({p_text}) than"
    if gain > 0:
        return False, f"{size} better, which may be chance ({p_text}, needed below {alpha:g}), than"
    if gain == 0:
        return False, f"no better ({p_text}) than"
    return False, f"{size} worse ({p_text}) than"
