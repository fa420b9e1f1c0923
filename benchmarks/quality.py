"""Quality and time to quality: millrace's training against scikit-learn's TF-IDF + logistic regression, on the same split.

python benchmarks/quality.py [PRESET]        (text-classify, the default, or debian-sections, digits)

Both are fitted on the train split, choose by the validation split and are judged once on the test split, one after the
other in this process. "to baseline" is the time after which millrace's validation accuracy first reaches the baseline's.
The peer's time holds its whole grid of C; millrace's is that of one training with the preset's parameters.
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import trainer
from trainer.artifacts.dataset import Dataset
from trainer.config.load import load
from trainer.evaluate import baseline, metrics, significance
from trainer.stage import execute


def train(params: Any, dataset: Dataset, target: float) -> tuple[np.ndarray, float, float | None]:
    """Probabilities on the test split, seconds in all, and seconds until the validation accuracy reached `target`."""
    from trainer import models, tasks
    from trainer.evaluate.score import label_probabilities
    from trainer.predict import Predictor
    from trainer.train.fit import fit
    from trainer.train.state import seed_all

    start = time.perf_counter()
    reached: list[float] = []

    def on_eval(step: int, found: dict[str, float]) -> None:
        if found["val_accuracy"] >= target:
            reached.append(time.perf_counter() - start)

    seed_all(params.train.seed)
    model = models.build(params.model, dataset.spec)
    fitted = fit(params, tasks.build(params, dataset), model, on_eval=on_eval)
    seconds = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        models.save(
            Path(folder),
            fitted.model,
            params.model,
            dataset.spec,
            dataset.labels,
            dataset.tokenizer_path,
            fitted.metrics,
        )
        probabilities = label_probabilities(Predictor(folder), dataset.split("test"))
    return probabilities, seconds, min(reached, default=None)


def main() -> None:
    preset = sys.argv[1] if len(sys.argv) > 1 else "text-classify"
    params = load(Path(trainer.__file__).parent / "presets" / f"{preset}.yaml")
    with tempfile.TemporaryDirectory() as temporary:
        quiet = io.StringIO()
        with contextlib.redirect_stdout(quiet):
            execute("preprocess", params, {}, {"dataset": f"{temporary}/dataset"})
            dataset = Dataset(f"{temporary}/dataset")
            peer, floor = baseline.label_baselines(dataset)
            target = max(peer.settings["val_accuracy"].values())
            probabilities, seconds, reached = train(params, dataset, target)
        actual = np.asarray(dataset.split("test").labels, np.int64)
        rows = [
            (floor.name, floor.probabilities, f"{floor.seconds:.1f}", ""),
            (peer.name, peer.probabilities, f"{peer.seconds:.1f}", f"{peer.seconds:.1f}"),
            (
                f"millrace {params.model.name}",
                probabilities,
                f"{seconds:.1f}",
                f"{reached:.1f}" if reached else "never",
            ),
        ]
        print(
            f"{preset}: {len(dataset.split('train')):,} training rows, {len(actual):,} test rows, {len(dataset.labels)} labels\n"
        )
        print(f"{'method':<46}{'accuracy':>9}{'macro-F1':>10}{'seconds':>9}{'to baseline':>13}")
        for name, found, took, until in rows:
            figures = metrics.classification(actual, found, 15)
            print(f"{name:<46}{figures['accuracy']:>9.4f}{figures['macro_f1']:>10.4f}{took:>9}{until:>13}")
        right = (probabilities.argmax(axis=1) == actual, peer.probabilities.argmax(axis=1) == actual)
        p_value, ours, theirs = significance.mcnemar(*right)
        ratio = f", {peer.seconds / reached:.1f}x the peer's speed to its own accuracy" if reached else ""
        print(f"\nexact McNemar p = {p_value:.2g} (only millrace right: {ours}, only the peer: {theirs}){ratio}")


if __name__ == "__main__":
    main()
