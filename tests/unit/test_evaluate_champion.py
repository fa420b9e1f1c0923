"""Which rows of the champion's test set a challenger has seen in training, however its data was cleaned."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.tiny import tiny_dataset
from trainer.artifacts import manifest
from trainer.artifacts.dataset import Dataset
from trainer.config.load import load
from trainer.evaluate.champion import _unseen
from trainer.stage import execute


def preprocessed(folder: Path, source: Path, *words: str) -> Dataset:
    params = load(None, [f"data.source={source}", "data.text=text", "data.label=label", "data.dedup.near=false",
                         "data.split.test=0.3", "data.tokenizer.vocab_size=300", *words])  # fmt: skip
    execute("preprocess", params, {}, {"dataset": str(folder)})
    return Dataset(folder)


def raw(path: Path, form: str) -> Path:
    rows = [form.format(number=number, label=f"l{number % 2}") for number in range(120)]
    path.write_text("text,label\n" + "\n".join(rows) + "\n", encoding="utf-8")
    return path


def overlap(champion: Dataset, challenger: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """For each test row of the champion by its number: whether it is unseen, and whether it truly is."""
    trained = {number(text) for name in ("train", "val") for text in challenger.split(name).texts()}
    split = champion.split("test")
    return _unseen(champion, split, challenger), np.asarray([number(text) not in trained for text in split.texts()])


def number(text: str) -> str:
    return "".join(character for character in text if character.isdigit())


@pytest.mark.parametrize("word", ["data.clean.whitespace=true", "data.clean.html=true", "data.clean.unicode=false"])
def test_rows_cleaned_in_another_way_are_known_again(tmp_path: Path, word: str) -> None:
    source = raw(tmp_path / "rows.csv", "<b>Row</b>  {number} e\u0301te,{label}")
    champion = preprocessed(tmp_path / "a", source)
    challenger = preprocessed(tmp_path / "b", source, word)
    assert not {*champion.split("test").column("id")} & {*challenger.split("train").column("id")}
    found, truth = overlap(champion, challenger)
    assert (found == truth).all()
    assert 0 < truth.sum() < len(truth)


def test_rows_of_another_file_are_known_by_their_words(tmp_path: Path) -> None:
    champion = preprocessed(tmp_path / "a", raw(tmp_path / "a.csv", "Row   {number} \u00e9t\u00e9!,{label}"))
    other = raw(tmp_path / "b.csv", "row {number} e\u0301te\u0301,{label}")
    found, truth = overlap(champion, preprocessed(tmp_path / "b", other, "data.split.seed=4"))
    assert (found == truth).all()
    assert 0 < truth.sum() < len(truth)


def test_texts_without_words_are_not_all_the_same(tmp_path: Path) -> None:
    """Rows of punctuation have no words; only an equal one is a seen one."""
    source = tmp_path / "rows.csv"
    rows = [f'"{"+" * (number + 1)}",l{number % 2}' for number in range(60)]
    source.write_text("text,label\n" + "\n".join(rows) + "\n", encoding="utf-8")
    champion = preprocessed(tmp_path / "a", source)
    assert _unseen(champion, champion.split("test"), champion).all()


def test_pictures_are_not_known_by_their_file_names(tmp_path: Path) -> None:
    champion = tiny_dataset(tmp_path / "a", "image", 40)
    other = tiny_dataset(tmp_path / "b", "image", 40, seed=1)
    assert _unseen(champion, champion.split("test"), other).all()
    swapped = shutil.copytree(other.folder, tmp_path / "c")
    (swapped / "manifest.json").unlink()
    shutil.rmtree(swapped / "train")
    shutil.copytree(champion.folder / "test", swapped / "train")
    manifest.seal(swapped, "dataset", other.meta, {})
    assert not _unseen(champion, champion.split("test"), Dataset(swapped)).any()
