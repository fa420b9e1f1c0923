"""Words `section.key=value` in one text, as a run form has them."""

from __future__ import annotations

import re
from typing import Any

from trainer.errors import ConfigError

# A space divides words only if a key follows: lists and texts may hold spaces.
_BETWEEN_WORDS = re.compile(r"\s*\n\s*|\s+(?=[A-Za-z_][\w-]*(?:\.[\w-]+)+=)")


def split_words(words: Any) -> list[str]:
    """A text with words divided by line breaks, or by spaces before the next key, or a list -> the words.

    Raises:
        ConfigError: it is neither.
    """
    if isinstance(words, str):
        return [word for word in _BETWEEN_WORDS.split(words.strip()) if word]
    if not isinstance(words, list):
        raise ConfigError("parameter overrides: must be a list or a text", "for example train.lr=1e-3 train.epochs=2")
    return [str(word) for word in words]
