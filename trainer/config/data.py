"""Sections `data` and `task`: where the raw data is, how it is cleaned, split and tokenised, and what is learned."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from trainer import plugins
from trainer.config.base import Section, no_bool
from trainer.config.names import one_of


def known_encoding(name: str) -> str:
    """A validator that accepts only names of character encodings."""
    try:
        "a".encode(name)
    except (LookupError, ValueError):
        raise ValueError(f"{name[:40]!r} is not a character encoding; for example utf-8 or latin-1") from None
    return name


Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]


class Task(Section):
    """What is learned from the data."""

    name: Annotated[str, AfterValidator(one_of(plugins.TASKS))] = "classify"
    """`classify` labels texts, `lm` predicts the next token, `image` labels pictures."""


class Clean(Section):
    """Cleaning of each text, in this order: HTML, Unicode, whitespace, bounds, language."""

    html: bool = False
    """Remove HTML tags and decode entities."""
    unicode: bool = True
    """Normalise to Unicode NFC and drop control characters."""
    whitespace: bool = False
    """Collapse runs of white space to one space (leave off for source code, where indentation has a meaning)."""
    min_chars: int = Field(default=1, ge=0)
    """Drop texts shorter than this many characters."""
    max_chars: int = Field(default=1_000_000, ge=1)
    """Drop texts longer than this many characters."""
    language: str = Field(default="", pattern=r"^([a-z]{2})?$")
    """Keep only texts in this language (ISO 639-1 code, such as `en`); empty keeps all."""

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if self.min_chars > self.max_chars:
            raise ValueError(f"min_chars ({self.min_chars}) must not exceed max_chars ({self.max_chars})")
        return self


class Dedup(Section):
    """Removal of duplicates. A duplicate never crosses splits, because it is removed before splitting."""

    exact: bool = True
    """Drop all but one of texts that are equal after cleaning."""
    near: bool = True
    """Drop near duplicates found by MinHash (Broder 1997)."""
    threshold: float = Field(default=0.8, gt=0.0, le=1.0)
    """Jaccard similarity of word shingles from which two texts count as near duplicates."""


class Split(Section):
    """How rows are assigned to train, val and test: by a hash of their content, so the same text always falls alike."""

    val: Fraction = 0.1
    """Share of rows for validation."""
    test: Fraction = 0.1
    """Share of rows for the final test."""
    stratify: bool = False
    """Keep each label's share the same in all splits."""
    seed: int = Field(default=0, ge=0)
    """Changes the assignment."""

    @model_validator(mode="after")
    def _leaves_training_rows(self) -> Self:
        if self.val + self.test >= 1.0:
            raise ValueError(f"val ({self.val}) + test ({self.test}) must leave rows for training")
        return self


class Tokenizer(Section):
    """Byte-level BPE, trained on the train split."""

    vocab_size: int = Field(default=8192, ge=264, le=1_000_000)
    """Number of tokens, special tokens included."""
    path: str = ""
    """Use this tokenizer.json instead of training one; empty trains one."""
    lowercase: bool = False
    """Lower-case texts first; the served model does so too."""
    prefix_space: bool = False
    """Put a space before each text, so that its first word has the same tokens as anywhere else."""


class Data(Section):
    """Raw data: where it is and how it becomes a dataset."""

    source: str = Field(default="builtin:stdlib-functions", min_length=1)
    """`builtin:NAME`, a path, a glob, a folder, `s3://...` or `dvc:REPO@REV:PATH`."""
    format: Literal["auto", "csv", "tsv", "jsonl", "json", "text", "parquet", "images"] = "auto"
    """Format of the files; `auto` goes by the file name."""
    text: str = "text"
    """Column or key that holds the text (or, for images, the file name in labels.csv)."""
    label: str = "label"
    """Column or key that holds the label."""
    encoding: Annotated[str, AfterValidator(known_encoding)] = "utf-8"
    """Character encoding of text files."""
    max_bad_rows: int = Field(default=100, ge=0)
    """Stop with an error after more malformed rows than this; up to it they are counted and dropped."""
    max_rows: int = Field(default=0, ge=0)
    """Use at most this many rows, chosen by content hash; 0 uses all."""
    min_label_rows: int = Field(default=2, ge=1)
    """Drop labels with fewer rows than this."""
    clean: Clean = Clean()
    dedup: Dedup = Dedup()
    split: Split = Split()
    tokenizer: Tokenizer = Tokenizer()
    max_length: int = Field(default=512, ge=8)
    """Longest text in tokens for `classify` (the rest is cut off); length of a sequence for `lm`."""
    image_size: int = Field(default=8, ge=4, le=1024)
    """Pictures are scaled to this many pixels on each side."""
    image_channels: Annotated[Literal[1, 3], BeforeValidator(no_bool)] = 1
    """1 for grey, 3 for RGB."""
    engine: Literal["daft", "ray", "pool"] = "daft"
    """`daft` runs embedded; `ray` runs the same code on a Ray cluster; `pool` is the plain process pool."""
    workers: int = Field(default=0, ge=0)
    """Worker processes; 0 uses all cores."""
