"""Cold start: from starting Python to the end of the first optimizer step, against Hugging Face Trainer.

python benchmarks/cold_start.py

Both train the same model (our two-layer encoder) on the same rows with AdamW; each process ends itself at the end of
its first step, by the same hook. Runs alternate, so that a busy machine is equally unfair to both; medians are
reported. What this measures is what a pod pays before it does any work: imports and set-up. Goal: at most half.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RUNS = 5
ROWS = 2000

# The exit status says that the step was reached, and not something else's end.
HOOK = """
import os, sys
from torch.optim.optimizer import register_optimizer_step_post_hook
register_optimizer_step_post_hook(lambda *_: os._exit(77))
"""

OURS = (
    HOOK
    + """
from trainer.__main__ import main
sys.exit(main(["train", "--in", f"dataset={sys.argv[1]}", "--out", f"model={sys.argv[2]}", "model.name=encoder"]))
"""
)

PEER = (
    HOOK
    + """
import numpy as np, torch
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments
from trainer import models
from trainer.artifacts.dataset import Dataset
from trainer.config.model import Encoder
from trainer.tasks.classify import pad_rows

data = Dataset(sys.argv[1])
split = data.split("train")

class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return len(split)

    def __getitem__(self, i):
        return split.tokens[split.offsets[i] : split.offsets[i + 1]][: data.spec.max_length], int(split.labels[i])

class Classifier(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = models.build(Encoder(), data.spec)

    def forward(self, tokens, labels):
        logits = self.inner(tokens)
        return {"loss": cross_entropy(logits, labels), "logits": logits}

def collate(rows):
    lengths = np.array([len(tokens) for tokens, _ in rows])
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    tokens = pad_rows(np.concatenate([tokens for tokens, _ in rows]), starts, lengths, data.spec.max_length)
    return {"tokens": torch.from_numpy(tokens), "labels": torch.tensor([label for _, label in rows])}

options = TrainingArguments(
    sys.argv[2], per_device_train_batch_size=64, learning_rate=1e-3, num_train_epochs=5, report_to=[], use_cpu=True,
    disable_tqdm=True, remove_unused_columns=False, save_strategy="no",
)
Trainer(Classifier(), options, train_dataset=Rows(), data_collator=collate).train()
"""
)


def make_dataset(folder: Path) -> Path:
    rows = folder / "rows.csv"
    lines = [f"the {i}th text of {'many' if i % 2 else 'few'} words,{i % 2}" for i in range(ROWS)]
    rows.write_text("text,label\n" + "\n".join(lines) + "\n", encoding="utf-8")
    words = [f"data.source={rows}", "data.dedup.near=false", "data.tokenizer.vocab_size=300", "data.max_length=64"]
    command = [sys.executable, "-m", "trainer", "preprocess", "--out", f"dataset={folder / 'dataset'}", *words]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "dataset"


def seconds(code: str, dataset: Path, out: Path) -> float:
    """Seconds from starting a process to the end of its first optimizer step."""
    environment = os.environ | {"PYTHONPATH": str(Path.cwd()), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, str(dataset), str(out)], env=environment, capture_output=True)
    taken = time.perf_counter() - start
    if done.returncode != 77:
        raise SystemExit(f"a run ended with {done.returncode} before its first step:\n{done.stderr.decode()}")
    return taken


def main() -> None:
    try:
        import accelerate  # noqa: F401
        import transformers  # noqa: F401
    except ImportError:
        raise SystemExit("needs transformers and accelerate: pip install -r requirements/bench.txt") from None
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        dataset = make_dataset(root)
        # The first pair fills the file cache.
        pairs = [
            (seconds(OURS, dataset, root / f"m{i}"), seconds(PEER, dataset, root / f"p{i}")) for i in range(RUNS + 1)
        ]
    ours, peer = (statistics.median(column) for column in zip(*pairs[1:], strict=True))
    ratio = statistics.median(a / b for a, b in pairs[1:])
    print(f"{'start to first step':<28}{'median of ' + str(RUNS):>14}")
    print(f"{'millrace':<28}{ours:>12.2f} s")
    print(f"{'Hugging Face Trainer':<28}{peer:>12.2f} s")
    print(f"{'ratio':<28}{ratio:>12.2f}     goal <= 0.5: {'met' if ratio <= 0.5 else 'missed'}")


if __name__ == "__main__":
    main()
