"""What evaluate and promote have to say."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from trainer.views import markdown as md
from trainer.views.facts import Facts, Told
from trainer.views.prepared import FEW_ROWS

_COLUMNS = (
    ("accuracy", "accuracy"), ("macro_f1", "macro-F1"), ("ece", "calibration error"),
    ("bits_per_byte", "bits per byte"), ("perplexity", "perplexity"), ("bytes", "size, bytes"),
    ("latency_p50_ms", "latency p50, ms"), ("latency_p99_ms", "p99, ms"), ("throughput_per_s", "inputs per s"),
)  # fmt: skip
_TIMED = "Latency of one input, throughput in batches, both on one CPU thread."
_WHO = ("candidate", "student", "teacher", "baseline", "most_frequent", "xz")


def evaluate(facts: Facts) -> Told:
    """All models side by side, the comparisons, and the gate's decision with its reason."""
    found = facts.read("evaluation", "metrics.json")
    gate, candidate = found["gate"], found["candidate"]
    metric = "bits_per_byte" if "bits_per_byte" in candidate else "accuracy"
    title = dict(_COLUMNS)[metric]
    lead = (
        f"Tested what would be served on **{md.number(found['test_rows'])}** rows it has never seen:"
        f" {title} **{md.score(candidate[metric])}**."
    )
    order = "less is better" if metric == "bits_per_byte" else "more is better"
    body = [
        md.section(
            "Decision of the gate",
            f"**{_verdict(gate['decision'])}**: {md.prose(gate['reason'])}.",
            f"Level of significance {md.number(gate['alpha'])}; champion before: "
            f"{md.code(gate['champion']) if gate['champion'] else 'none'}.",
        ),
        md.section("Figures on the test split", _figures(found), f"{title.capitalize()}: {order}. {_TIMED}"),
        md.section("The candidate against the others", _comparisons(found, metric)),
        md.section("The candidate against the champion", _champion(found.get("champion") or {})),
    ]
    refused = gate["decision"] != "promoted"
    next_ = ["`report` (HTML) of this step has learning curves, errors by label and examples."]
    if metric == "accuracy":
        next_.append(
            "`confusion` and `roc` of this step show which labels are taken for one another, and how sure it is."
        )
    next_.append(
        "Stage promote enters it in the registry as a version, but not as champion."
        if refused
        else "Stage promote enters it in the registry and makes it the champion."
    )
    return Told(lead, body, _warnings(found, metric), next_, "refused" if refused else "done")


def promote(facts: Facts) -> Told:
    """What was decided, which version is the champion now, and where the registry is."""
    found = facts.read("promotion", "promotion.json")
    version, champion, previous = md.code(found["version"]), found.get("champion", ""), found.get("previous", "")
    promoted = found["decision"] == "promoted"
    lead = f"**{_verdict(found['decision'])}**: {md.code(found['model'])} {version}. {_sentence(found['reason'])}"
    rows = [
        ("champion now", _version(champion, found.get("champion_digest", ""))),
        ("champion before", _version(previous, "")),
        ("this candidate", _version(found["version"], found["digest"])),
        ("registry", md.code(found["registry"], 200)),
    ]
    warnings = []
    if not champion:
        warnings.append("The registry has no champion: nothing of it is served until one is promoted or named.")
    if facts.temporary:
        warnings.append(
            "**The registry ends with this step**: it is a folder inside of its container, so no later run finds this"
            " version or champion. Set the pipeline input `registry` to a URI (`s3://…`) or to a mounted path."
        )
    steps = [] if facts.temporary else _commands(found, promoted)
    if not promoted:
        steps.append("The report of stage evaluate shows where it errs; more trials or epochs may help.")
    return Told(lead, [md.table(("", ""), rows, left=2)], warnings, steps, "promoted" if promoted else "refused")


def _version(version: Any, digest: Any) -> str:
    if not version:
        return "none"
    return md.code(version) + (f", digest {md.code(str(digest)[:12])}" if digest else "")


def _commands(found: Mapping[str, Any], promoted: bool) -> list[str]:
    """What can be done about the decision, in words to copy."""
    registry, model, version = (shlex.quote(str(found[key])) for key in ("registry", "model", "version"))
    said = f"millrace registry --uri {registry}"
    commands = [(f"{said} show {model} {version}", "shows its figures and where it comes from")]
    if promoted and found.get("previous") not in ("", None, found.get("champion")):
        commands.append((f"{said} rollback {model}", "takes the decision back"))
    if not promoted:
        commands.append((f"{said} promote {model} {version}", "makes it the champion all the same"))
    return [f"{md.code(command, 300)} {words}." for command, words in commands]


def _verdict(decision: Any) -> str:
    return {"promoted": "Promoted", "refused": "Refused"}.get(str(decision)) or md.prose(decision)


def _sentence(text: Any) -> str:
    plain = str(text)
    return f"{md.prose(plain[:1].upper() + plain[1:])}."


def _figures(found: Mapping[str, Any]) -> str:
    rows = []
    for who in _WHO:
        figures = found.get(who)
        if not isinstance(figures, Mapping) or not any(key in figures for key, _ in _COLUMNS):
            continue
        name = f"{who.replace('_', ' ')}"
        if "name" in figures:
            # A packer is no model: it is there for scale, and not part of the gate.
            name = f"{'for scale' if who == 'xz' else 'baseline'}: {md.prose(figures['name'])}"
        rows.append((name, *(_cell(key, figures.get(key)) for key, _ in _COLUMNS)))
    return md.table(("", *(title for _, title in _COLUMNS)), rows)


def _cell(key: str, value: Any) -> str:
    if key in ("accuracy", "macro_f1", "ece", "bits_per_byte"):
        return md.score(value)
    return md.number(value, 3)


def _comparisons(found: Mapping[str, Any], metric: str) -> str:
    every = {"baseline": found.get("comparison") or {}, **(found.get("comparisons") or {})}
    rows = []
    for other in ("baseline", "teacher", "student"):
        each = every.get(other) or {}
        if metric in each:
            interval = each[metric]
            rows.append(
                (other, *(_signed(interval[key], metric) for key in ("value", "low", "high")), _p(each["p_value"]))
            )
    unit = "points" if metric == "accuracy" else "bits per byte"
    level = md.share((every["baseline"] or every.get("teacher") or {}).get("confidence"))
    head = ("candidate minus", f"difference, {unit}", f"low ({level})", "high", "p")
    return md.table(head, rows) if rows else ""


def _champion(champion: Mapping[str, Any]) -> str:
    if not champion:
        return ""
    version = md.code(champion.get("version", ""))
    if champion.get("incomparable"):
        return f"Champion {version} cannot be compared: {md.prose(champion['incomparable'])}."
    if "p_value" not in champion:
        return f"It is champion {version} itself."
    rows = [
        (who, *(_cell(key, champion[who].get(key)) for key, _ in _COLUMNS))
        for who in ("candidate", "champion")
        if isinstance(champion.get(who), Mapping)
    ]
    left_out = champion.get("left_out", 0)
    note = f"On the test set that champion {version} was judged on: {md.number(champion.get('rows'))} rows"
    note += f", {md.number(left_out)} more left out because the candidate saw them in training" if left_out else ""
    return f"{note}; p {_p(champion['p_value'])}.\n\n" + md.table(("", *(title for _, title in _COLUMNS)), rows)


def _signed(value: float, metric: str) -> str:
    return f"{100 * value:+.2f}" if metric == "accuracy" else f"{value:+.4f}"


def _p(value: float) -> str:
    return "below 0.0001" if value < 1e-4 else f"{value:.4f}"


def _warnings(found: Mapping[str, Any], metric: str) -> list[str]:
    warnings = []
    candidate = found["candidate"]
    sign = -1 if metric == "bits_per_byte" else 1

    def gain(other: str) -> float | None:
        """How much better the candidate is than another."""
        value = (found.get(other) or {}).get(metric)
        return sign * (candidate[metric] - value) if isinstance(value, (int, float)) else None

    behind = gain("baseline")
    if behind is None:
        warnings.append(
            "No baseline was fitted (`evaluate.baseline`): nothing shows that a simpler method is not better."
        )
    elif behind < 0:
        name = md.prose((found["baseline"]).get("name", ""))
        warnings.append(f"**It is worse than the baseline** ({name}), which is simpler and quicker to make.")
    trivial = gain("most_frequent")
    if trivial is not None and trivial <= 0:
        warnings.append("**It is no better than always naming the most frequent label**: it has learned nothing.")
    packed = gain("xz")
    if packed is not None and packed < 0:
        warnings.append("It predicts the texts worse than a packer (xz) does: it has learned little of them.")
    teacher = (found.get("comparisons") or {}).get("teacher") or {}
    if metric in teacher and sign * teacher[metric]["value"] < 0 and teacher["p_value"] < 0.01:
        warnings.append("It is significantly worse than its teacher: compression costs something here.")
    if candidate.get("ece", 0) > 0.1:
        warnings.append(
            f"Its probabilities are off by {md.share(candidate['ece'])} on average: do not take them at their word."
        )
    if found["test_rows"] < FEW_ROWS:
        warnings.append(f"{found['test_rows']:,} test rows are few: small differences are chance.")
    return warnings
