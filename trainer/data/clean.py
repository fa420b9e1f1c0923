"""Cleaning of one text: HTML, Unicode, white space, bounds, language. Pure functions, each a no-op the second time."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from html.parser import HTMLParser

from trainer.config.data import Clean
from trainer.errors import ConfigError

# Everything of Unicode's category Cc but tab and line feed; carriage returns become line feeds first.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_ASCII_CONTROL = bytes(byte for byte in range(128) if _CONTROL.match(chr(byte)))
_SPACE = re.compile(r"\s+")
_WORD = re.compile(r"[^\W\d_]+")
_BLOCK_NAMES = (
    "address article aside blockquote br dd div dl dt fieldset figcaption figure footer form h1 h2 h3 h4 h5 h6 header "
    "hr li main nav ol p pre section table td th tr ul"
)
_BLOCKS = frozenset(_BLOCK_NAMES.split())
_HIDDEN = frozenset(("script", "style", "template", "noscript"))

# The most frequent function words: enough to tell languages that use the same script apart.
STOP_WORDS: dict[str, frozenset[str]] = {
    code: frozenset(words.split())
    for code, words in {
        "en": "the of and to in is that it for was on with as are be this by an at not from or have which you but were all",
        "de": "der die und das ist nicht ein eine zu den mit von sich auf für dem des auch im als es an werden aus er sind",
        "fr": "le la les de des et est un une du en que qui dans pour pas au sur ce il plus par ne se avec son sont",
        "es": "el la los las de que y en un una es por con no para se del al lo como más su pero sus este son",
        "it": "il la di che e è un una per in non con del le si da gli della sono al come più ma dei nel questo",
        "pt": "o a os as de que e em um uma é do da não para com por no na se mais dos como mas foi ao são",
        "nl": "de het een en van ik te dat die in is niet op zijn met voor er aan maar om hij ook als bij zijn worden",
        "sv": "och att det som en på är av för med den till inte ett om har de jag var men sig så vi från",
        "pl": "i w na z się nie że do to jest o jak po co za od przez ale są dla czy tak był jego",
        "ru": "и в не на что я с он как это по но она из за то все у от так же для вы мы был",
    }.items()
}


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _HIDDEN:
            self.hidden += 1
        elif tag in _BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in _HIDDEN:
            self.hidden = max(self.hidden - 1, 0)
        elif tag in _BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.parts.append(data)


def strip_html(text: str) -> str:
    """The visible text: tags, scripts, styles and comments removed, entities decoded, block elements on their own lines."""
    if "<" not in text and "&" not in text:
        return text
    parser = _Text()
    try:
        parser.feed(text)
        parser.close()
    except AssertionError:
        # html.parser gives up on what is no marked section, such as `<![0`: then those are text.
        parser = _Text()
        parser.feed(text.replace("<![", "&lt;!["))
        parser.close()
    return re.sub(r"[ \t]*\n\s*", "\n", "".join(parser.parts)).strip()


def normalise_unicode(text: str) -> str:
    """NFC, line feeds as line ends, and no control characters but tab and line feed."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if text.isascii():
        # Twice as fast as the regular expression, which finds that most texts hold none.
        raw = text.encode()
        return raw.translate(None, _ASCII_CONTROL).decode()
    if not unicodedata.is_normalized("NFC", text):
        text = unicodedata.normalize("NFC", text)
    if _CONTROL.search(text):
        # Taking out a control character can bring a letter and its accent together.
        text = unicodedata.normalize("NFC", _CONTROL.sub("", text))
    return text


def collapse_space(text: str) -> str:
    """Each run of white space as one space, none at the ends."""
    return _SPACE.sub(" ", text).strip()


def language_of(text: str) -> str:
    """The language whose function words make up the largest share of the text's words; empty if none occurs."""
    words = _WORD.findall(text[:4000].lower())
    best, most = "", 0
    for code, stop_words in STOP_WORDS.items():
        hits = sum(word in stop_words for word in words)
        if hits > most:
            best, most = code, hits
    return best


def make_cleaner(clean: Clean) -> Callable[[str], tuple[str, str]]:
    """A function text -> (cleaned text, reason): an empty reason keeps the text.

    Reasons: empty, too_short, too_long, language.

    Raises:
        ConfigError: the language is not one that `STOP_WORDS` knows.
    """
    if clean.language and clean.language not in STOP_WORDS:
        known = ", ".join(sorted(STOP_WORDS))
        raise ConfigError(
            f"data.clean.language: {clean.language!r} is not known", f"use one of {known}, or leave it empty"
        )
    steps: list[Callable[[str], str]] = []
    if clean.html:
        steps.append(strip_html)
    if clean.unicode:
        steps.append(normalise_unicode)
    if clean.whitespace:
        steps.append(collapse_space)

    def run(text: str) -> tuple[str, str]:
        for step in steps:
            text = step(text)
        if not text or text.isspace():
            return text, "empty"
        if len(text) < clean.min_chars:
            return text, "too_short"
        if len(text) > clean.max_chars:
            return text, "too_long"
        if clean.language and language_of(text) != clean.language:
            return text, "language"
        return text, ""

    return run
