"""What CONTRIBUTING says: a model, a task or an optimizer is one file and one line in a registry. Done to a copy."""

from __future__ import annotations

import shutil
import subprocess
import sys

from tests.tiny import tiny_dataset

MODEL = '''
"""A model of one layer: the mean of the tokens' embeddings."""
from torch import nn

class Toy(nn.Module):
    def __init__(self, config, spec):
        super().__init__()
        self.bag = nn.EmbeddingBag(spec.vocab_size, config.width, mode="sum", padding_idx=0)
        self.output = nn.Linear(config.width, spec.num_labels)

    def forward(self, tokens):
        return self.output(self.bag(tokens))

def build(config, spec):
    return Toy(config, spec)
'''
FAMILY = '''
class Toy(Family):
    """A toy."""

    name: Literal["toy"] = "toy"
    width: int = 8
    """Width."""


'''
OPTIMIZER = '''
"""The sign of the gradient (Bernstein et al. 2018)."""
import torch

class Sign(torch.optim.Optimizer):
    def step(self, closure=None):
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter -= group["lr"] * parameter.grad.sign()

def sign(named, train):
    return Sign([parameter for _, parameter in named], {"lr": train.lr})
'''
TASK = '''
"""Classification by the squared error (Brier 1950)."""
from trainer.tasks.classify import Classify
from torch.nn.functional import one_hot

class Brier(Classify):
    name = "classify"

    def losses(self, model, batch):
        error = self.forward(model, batch).softmax(1) - one_hot(batch["targets"], self.spec.num_labels)
        return {"brier": error.square().sum()}
'''


def insert(path, before: str, line: str) -> None:
    text = path.read_text()
    assert text.count(before) == 1
    path.write_text(text.replace(before, line + before))


def test_a_model_an_optimizer_and_a_task_are_a_file_and_a_line_each(root, tmp_path):
    shutil.copytree(root / "trainer", tmp_path / "trainer", ignore=shutil.ignore_patterns("__pycache__"))
    package = tmp_path / "trainer"
    (package / "models" / "toy.py").write_text(MODEL)
    (package / "train" / "sign.py").write_text(OPTIMIZER)
    (package / "tasks" / "brier.py").write_text(TASK)
    insert(package / "config" / "model.py", "# name -> (parameters, module", FAMILY)
    insert(
        package / "config" / "model.py",
        '    "ngram": (NgramBag,',
        '    "toy": (Toy, "trainer.models.toy", ("classify", "brier")),\n',
    )
    insert(package / "plugins.py", '    "sgd": ', '    "sign": "trainer.train.sign:sign",\n')
    insert(package / "plugins.py", '    "classify": ', '    "brier": "trainer.tasks.brier:Brier",\n')
    dataset = tiny_dataset(tmp_path / "dataset", "classify", rows=120)
    words = ["model.name=toy", "model.width=12", "task.name=brier", "train.optimizer=sign", "train.lr=0.03",
             "distill.enabled=false", "train.threads=1", "train.batch_size=8", "train.epochs=10",]  # fmt: skip
    command = [
        sys.executable,
        "-m",
        "trainer",
        "train",
        "--in",
        f"dataset={dataset.folder}",
        "--out",
        "model=out",
        *words,
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"name": "toy"' in (tmp_path / "out" / "config.json").read_text()
    accuracies = [float(word.split("=")[1]) for word in done.stdout.split() if word.startswith("val_accuracy=")]
    assert max(accuracies) > 0.5
