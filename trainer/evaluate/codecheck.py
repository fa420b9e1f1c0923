"""Does a language model of Python write lines that parse? Next lines of real files, completed greedily and checked.

Free-running samples of a small model almost never parse as a whole; the next line after a real prefix is the unit
that an editor would show.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.artifacts.dataset import END, PAD

if TYPE_CHECKING:
    from trainer.predict import Predictor

LINES = 32
CONTEXT = 128
MAX_TOKENS = 40
# What may stand before or after a line that is the head of a block or a part of a compound statement.
_SCAFFOLDS = (
    "{line}",
    "{line}\n    pass",
    "if x:\n    pass\n{line}\n    pass",
    "try:\n    pass\n{line}\n    pass",
    "try:\n    pass\n{line}\n    pass\nfinally:\n    pass",
    "match x:\n  {line}\n    pass",
    "{line}\ndef f():\n    pass",
)


def parses(line: str) -> bool:
    """Whether a line of Python is a statement, or the head of one: `x = 1`, `for x in y:`, `else:`, `@decorator`."""
    line = line.strip()
    if not line:
        return False
    for scaffold in _SCAFFOLDS:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ast.parse(scaffold.format(line=line) if "{" in scaffold else line)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        return True
    return False


def positions(texts: Sequence[str], count: int, seed: int) -> list[tuple[str, str]]:
    """(everything before a line, the line) for single-line statements of files that parse; at most one per file.

    The indentation belongs to what comes before, so that a model is asked for the statement alone.
    """
    random = np.random.default_rng(seed)
    found: list[tuple[str, str]] = []
    for index in random.permutation(len(texts)):
        if len(found) == count:
            break
        text = texts[index]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        lines = text.splitlines(keepends=True)
        single = sorted(
            {
                node.lineno
                for node in ast.walk(tree)
                if isinstance(node, ast.stmt) and node.lineno == node.end_lineno and node.lineno > 3
            }
        )
        single = [number for number in single if number <= len(lines) and parses(lines[number - 1])]
        if single:
            number = int(random.choice(single))
            line = lines[number - 1]
            indent = line[: len(line) - len(line.lstrip())]
            found.append(("".join(lines[: number - 1]) + indent, line.strip()))
    return found


def complete_lines(predictor: Predictor, prefixes: Sequence[str]) -> list[tuple[str, bool]]:
    """The rest of the line that each prefix stops in, chosen greedily, and whether it came to an end.

    All prefixes go through the model together; a line has MAX_TOKENS tokens to end in.
    """
    tokenizer = predictor.tokenizer
    tokenizer.no_truncation()
    size = min(CONTEXT, predictor.spec.max_length - 1)
    encoded = tokenizer.encode_batch(list(prefixes), add_special_tokens=False)
    contexts = [list(each.ids[-size:]) or [END] for each in encoded]
    made: list[list[int]] = [[] for _ in prefixes]
    open_ = list(range(len(prefixes)))
    for _ in range(MAX_TOKENS):
        if not open_:
            break
        rows = [(contexts[i] + made[i])[-predictor.spec.max_length :] for i in open_]
        tokens = np.full((len(rows), max(len(row) for row in rows)), PAD, np.int64)
        for place, row in enumerate(rows):
            tokens[place, : len(row)] = row
        logits = predictor.logits(tokens)
        still = []
        for place, i in enumerate(open_):
            scores = logits[place, len(rows[place]) - 1].copy()
            scores[PAD] = -np.inf
            token = int(scores.argmax())
            if token == END:
                continue
            made[i].append(token)
            if "\n" not in tokenizer.decode(made[i]):
                still.append(i)
        open_ = still
    return [(tokenizer.decode(tokens).split("\n")[0], i not in open_) for i, tokens in enumerate(made)]


def check(predictor: Predictor, texts: Sequence[str], seed: int, count: int = LINES) -> dict[str, Any]:
    """Share of completed lines that parse (`valid`) and that equal the real line (`exact`), with a few to show.

    Returns:
        `lines`, `valid`, `exact`, `examples` [{"before", "completed", "actual", "valid"}]; empty if fewer than half of
        the texts are Python.
    """
    found = positions(texts, count, seed)
    if len(found) < min(count, len(texts)) / 2:
        return {}
    ended = complete_lines(predictor, [before for before, _ in found])
    completed = [line for line, _ in ended]
    # A line that goes on and on is not a valid one, even if what there is of it would parse.
    valid = [done and parses(line) for line, done in ended]
    exact = [line.strip() == actual for line, (_, actual) in zip(completed, found, strict=True)]
    examples = [
        {"before": "\n".join(before.splitlines()[-4:]), "completed": line, "actual": actual, "valid": ok}
        for (before, actual), line, ok in zip(found, completed, valid, strict=True)
    ]
    return {
        "lines": len(found),
        "valid": sum(valid) / len(found),
        "exact": sum(exact) / len(found),
        "examples": examples,
    }
