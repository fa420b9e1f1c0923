"""Cleaning kernels: properties that hold for any text."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trainer.config.data import Clean
from trainer.data.clean import collapse_space, language_of, make_cleaner, normalise_unicode, strip_html
from trainer.errors import ConfigError

texts = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=80)


@given(texts)
def test_unicode_is_nfc_without_control_characters_and_idempotent(text: str) -> None:
    once = normalise_unicode(text)
    assert unicodedata.is_normalized("NFC", once)
    assert not [char for char in once if unicodedata.category(char) == "Cc" and char not in "\t\n"]
    assert normalise_unicode(once) == once


@given(texts, texts)
def test_composed_and_decomposed_forms_clean_to_the_same_text(left: str, right: str) -> None:
    text = left + "é Å ﬁ 각" + right
    decomposed = unicodedata.normalize("NFD", text)
    assert normalise_unicode(decomposed) == normalise_unicode(unicodedata.normalize("NFC", decomposed))


@given(texts)
def test_collapsed_space_keeps_the_words_and_nothing_else(text: str) -> None:
    assert collapse_space(text) == " ".join(text.split())


def test_line_ends_become_line_feeds() -> None:
    assert normalise_unicode("a\r\nb\rc\nd") == "a\nb\nc\nd"


HTML = {
    "tags": ("<p>Hello <b>world</b></p>", "Hello world"),
    "entities": ("Fish &amp; chips &lt;3 &#8364;", "Fish & chips <3 €"),
    "script": ("<script>alert('<p>x</p>')</script>kept<style>p{}</style>", "kept"),
    "comment": ("a<!-- <b>secret</b> -->b", "ab"),
    "blocks": ("<div>one</div><div>two</div>", "one\ntwo"),
    "breaks": ("one<br>two<br/>three", "one\ntwo\nthree"),
    "unclosed": ("<p>open <b>bold", "open bold"),
    "stray": ("if a < b and c > d", "if a < b and c > d"),
    "stray end of script": ("</script>text", "text"),
    "plain": ("no markup", "no markup"),
}


@pytest.mark.parametrize("name", HTML)
def test_html_leaves_the_visible_text(name: str) -> None:
    source, expected = HTML[name]
    assert strip_html(source) == expected


@pytest.mark.parametrize("wrong", ["<![0", "<![nonsense[x]]>", "<![ if"])
def test_what_is_no_marked_section_is_text(wrong: str) -> None:
    assert strip_html(f"<p>before</p>{wrong}") == f"before\n{wrong}"


@given(texts)
@example("[0")
def test_html_never_fails(text: str) -> None:
    strip_html(f"<a {text}<b>{text}</b &{text};<!{text}")


LANGUAGES = {
    "en": "The committee has decided that it will not be possible to finish the work before the end of the year",
    "de": "Der Ausschuss hat entschieden, dass es nicht möglich sein wird, die Arbeit vor dem Ende des Jahres zu beenden",
    "fr": "Le comité a décidé qu'il ne sera pas possible de terminer le travail avant la fin de l'année",
    "es": "El comité ha decidido que no será posible terminar el trabajo antes del final del año",
    "it": "Il comitato ha deciso che non sarà possibile finire il lavoro prima della fine dell'anno",
    "nl": "De commissie heeft besloten dat het niet mogelijk is om het werk voor het einde van het jaar af te maken",
    "ru": "Комитет решил, что не будет возможно закончить работу до конца года, но он это сделает",
}


@pytest.mark.parametrize("code", LANGUAGES)
def test_language_is_told_by_its_function_words(code: str) -> None:
    assert language_of(LANGUAGES[code]) == code


def test_text_without_function_words_has_no_language() -> None:
    assert language_of("n = q[0] * 42") == ""


REASONS = {
    "empty": ("  \n ", {}, "empty"),
    "empty although bounds allow it": ("", {"min_chars": 0}, "empty"),
    "only tags": ("<br><hr>", {"html": True}, "empty"),
    "short": ("abc", {"min_chars": 4}, "too_short"),
    "just long enough": ("abcd", {"min_chars": 4}, ""),
    "long": ("abcde", {"max_chars": 4}, "too_long"),
    "just short enough": ("abcd", {"max_chars": 4}, ""),
    "bounds count what is left": ("<b>a</b>", {"html": True, "max_chars": 1}, ""),
    "other language": (LANGUAGES["de"], {"language": "en"}, "language"),
    "same language": (LANGUAGES["de"], {"language": "de"}, ""),
}


@pytest.mark.parametrize("name", REASONS)
def test_reason_for_dropping(name: str) -> None:
    text, settings_given, reason = REASONS[name]
    assert make_cleaner(Clean(**settings_given))(text)[1] == reason


@settings(max_examples=200)
@given(texts, st.booleans(), st.booleans(), st.booleans())
def test_cleaning_twice_without_html_is_cleaning_once(text: str, unicode: bool, whitespace: bool, html: bool) -> None:
    run = make_cleaner(Clean(unicode=unicode, whitespace=whitespace))
    once, reason = run(text)
    assert reason or run(once) == (once, "")


def test_unknown_language_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"data\.clean\.language: 'xx'"):
        make_cleaner(Clean(language="xx"))
