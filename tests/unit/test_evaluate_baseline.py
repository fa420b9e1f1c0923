"""The baselines are honest: they learn, use nothing of the test split, and the n-gram model is a distribution."""

import lzma

import numpy as np
import pytest

from tests.tiny import tiny_dataset
from trainer.evaluate import baseline, codecheck, ngram


@pytest.mark.parametrize("task", ["classify", "image"])
def test_the_first_baseline_learns_and_the_second_is_the_floor(tmp_path, task):
    dataset = tiny_dataset(tmp_path / "d", task, 300, noise=0.0)
    strong, floor = baseline.label_baselines(dataset)
    actual = np.asarray(dataset.split("test").labels)
    assert (strong.probabilities.argmax(axis=1) == actual).mean() > 0.9
    counts = np.bincount(dataset.split("train").labels)
    assert set(floor.probabilities.argmax(axis=1)) == {counts.argmax()}
    for each in (strong, floor):
        assert each.probabilities.shape == (len(actual), 4)
        assert each.probabilities.sum(axis=1) == pytest.approx(1)


def test_c_is_chosen_on_validation_rows_and_test_labels_are_never_read(tmp_path, monkeypatch):
    dataset = tiny_dataset(tmp_path / "d", "classify", 200)
    first = baseline.tfidf(dataset)
    scores = first.settings["val_accuracy"]
    assert scores[first.settings["C"]] == max(scores.values())
    np.save(dataset.folder / "test" / "labels.npy", np.zeros(len(dataset.split("test")), np.int32))
    assert (baseline.tfidf(dataset).probabilities == first.probabilities).all()


def test_a_label_that_train_lacks_gets_no_probability(tmp_path):
    dataset = tiny_dataset(tmp_path / "d", "classify", 200)
    labels = np.load(dataset.folder / "train" / "labels.npy")
    labels[labels == 2] = 1
    np.save(dataset.folder / "train" / "labels.npy", labels)
    for each in baseline.label_baselines(dataset):
        assert (each.probabilities[:, 2] == 0).all()


def test_one_label_in_train_is_no_crash(tmp_path):
    dataset = tiny_dataset(tmp_path / "d", "classify", 60)
    np.save(dataset.folder / "train" / "labels.npy", np.full(len(dataset.split("train")), 3, np.int32))
    assert set(baseline.tfidf(dataset).probabilities.argmax(axis=1)) == {3}


def test_many_rows_are_sampled_and_the_name_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(baseline, "MAX_ROWS", 50)
    found = baseline.tfidf(tiny_dataset(tmp_path / "d", "classify", 200))
    assert "50 training rows" in found.name


TEXTS = ["def f(x):\n    return x + 1\n", "def g(y):\n    return y * 2\n", "class A:\n    pass\n", "ünïcode ✓\n"]


@pytest.mark.parametrize("context", ["", "def ", "zzzz", "    return"])
def test_ngram_probabilities_of_all_next_bytes_add_up_to_one(context):
    """256 continuations of the same context: the difference in bits is that of the next byte alone."""
    model = ngram.ByteNgram(TEXTS * 3)
    stream = np.frombuffer(context.encode(), np.uint8)
    total = 0.0
    for byte in range(256):
        grams = ngram._grams(np.append(stream, np.uint8(byte)), model.order)
        probability = 1 / 256
        for length, level in enumerate(model.levels):
            seen = grams[-1:] & np.uint64((1 << (8 * (length + 1))) - 1)
            place, found = ngram._find(level.contexts, seen >> np.uint64(8))
            gram, present = ngram._find(level.grams, seen)
            if found[0]:
                kept = max(level.counts[gram[0]] - level.discount, 0) if present[0] else 0
                total_count = level.totals[place[0]]
                probability = (kept + level.discount * level.kinds[place[0]] * probability) / total_count
        total += probability
    assert total == pytest.approx(1)


def test_ngram_bits_are_those_of_its_probabilities():
    """A worked example of order 1: after `a` always `b`."""
    model = ngram.ByteNgram(["ab" * 50], order=1)
    long, short = model.bits(["ab" * 20, "ab" * 10])
    assert (long - short) / 10 < 0.5
    assert model.bits(["zz"])[0] > 15


def test_ngram_counts_each_document_apart_and_charges_its_end():
    model = ngram.ByteNgram(TEXTS)
    bits = model.bits(TEXTS)
    assert len(bits) == len(TEXTS)
    assert (bits > 0).all()
    assert len(model.bits([])) == 0


def test_longer_context_predicts_repetitive_text_better():
    text = ["the cat sat on the mat, the dog sat on the log; " * 20]
    costs = [ngram.ByteNgram(text, order).bits(text)[0] for order in (1, 3, 5)]
    assert costs[0] > costs[1] > costs[2]


def test_xz_counts_only_what_the_test_documents_add():
    train = ["abcdefgh" * 500, "some text that comes back\n" * 30]
    seen = ngram.xz_bits_per_byte(train, [train[1]])
    unseen = ngram.xz_bits_per_byte(train, [np.random.default_rng(0).bytes(2000).hex()])
    assert 0 <= seen < 0.5
    assert 3.5 < unseen < 5
    alone = 8 * len(lzma.compress(train[1].encode(), preset=9 | lzma.PRESET_EXTREME)) / len(train[1])
    assert seen < alone


VALID = ["x = 1", "for x in y:", "else:", "elif a > b:", "except ValueError as e:", "finally:", "@decorator", "return x",
         "with open(f) as g:", "case 1:", "async def f():", "# note", "class A(B):"]  # fmt: skip
INVALID = ["x = = 1", "for in y:", "return (", "def f(", "", "   ", "x = 'a", "if a", "else", ") + 1"]


@pytest.mark.parametrize("line", VALID)
def test_lines_of_python_parse(line):
    assert codecheck.parses(line)


@pytest.mark.parametrize("line", INVALID)
def test_other_lines_do_not(line):
    assert not codecheck.parses(line)


def test_positions_are_statements_of_real_files():
    source = "import os\n\ndef f(a):\n    b = (a +\n         1)\n    return b\n\n\nprint(f(2))\n"
    found = codecheck.positions([source] * 40, 40, 0)
    assert {line for _, line in found} == {"return b", "print(f(2))"}
    before, line = next(pair for pair in found if pair[1] == "return b")
    assert source.startswith(before + line)
    assert before.endswith("\n    ")


def test_text_that_is_not_python_is_left_alone():
    assert codecheck.positions(["Once upon a time, there was", "a {b"], 5, 0) == []


class Typist:
    """Stands for a model: token by token it types a fixed continuation, or one that never ends its line."""

    def __init__(self, tokenizer, line: str) -> None:
        from trainer.artifacts.dataset import Spec

        self.tokenizer, self.spec = tokenizer, Spec("lm", vocab_size=tokenizer.get_vocab_size(), max_length=512)
        self.line = tokenizer.encode(line).ids
        self.calls = 0

    def logits(self, tokens):
        found = np.zeros((*tokens.shape, self.spec.vocab_size), np.float32)
        found[..., self.line[self.calls % len(self.line)]] = 1
        self.calls += 1
        return found


@pytest.mark.parametrize(("line", "valid"), [("x = 1\n", 1.0), ("x = =\n", 0.0), ("word", 0.0)])
def test_only_lines_that_end_and_parse_count_as_valid(tmp_path, line, valid):
    from tokenizers import Tokenizer

    dataset = tiny_dataset(tmp_path / "d", "lm", 40)
    tokenizer = Tokenizer.from_file(str(dataset.tokenizer_path))
    found = codecheck.check(Typist(tokenizer, line), dataset.split("train").texts(), 0, count=5)
    assert found["lines"] == 5
    assert found["valid"] == valid
    assert found["exact"] == 0
