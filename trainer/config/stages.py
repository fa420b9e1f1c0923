"""Sections `tune`, `distill`, `quantize`, `evaluate` and `promote`: what happens around and after training."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from trainer.config.base import Section
from trainer.config.model import Model, NgramBag
from trainer.config.names import one_of

# Metrics of the validation split, and which direction is better.
METRICS = {
    "val_accuracy": "maximize",
    "val_macro_f1": "maximize",
    "val_loss": "minimize",
    "val_bits_per_byte": "minimize",
    "val_perplexity": "minimize",
}

Scalar = int | float | str | bool


class Dimension(Section):
    """One dimension of the search space: either `low` and `high`, or `choices`."""

    type: Literal["float", "int", "categorical"] = "float"
    """`float` and `int` take `low` and `high`; `categorical` takes `choices`."""
    low: float | None = None
    """Smallest value."""
    high: float | None = None
    """Largest value."""
    log: bool = False
    """Search on a logarithmic scale."""
    step: float | None = Field(default=None, gt=0)
    """Distance between neighbouring values; needed for `grid`, where it is not a categorical."""
    choices: tuple[Scalar, ...] = ()
    """Values of a categorical dimension."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.type == "categorical":
            if not self.choices or self.low is not None or self.high is not None:
                raise ValueError("a categorical dimension takes `choices`, and neither `low` nor `high`")
        elif self.low is None or self.high is None or self.choices:
            raise ValueError(f"a dimension of type {self.type} takes `low` and `high`, and no `choices`")
        elif self.low >= self.high:
            raise ValueError(f"low ({self.low}) must be below high ({self.high})")
        elif self.log and self.low <= 0:
            raise ValueError(f"low ({self.low}) must be above 0 on a logarithmic scale")
        elif self.log and self.step is not None:
            raise ValueError("step cannot be combined with log")
        elif self.type == "int" and not (float(self.low).is_integer() and float(self.high).is_integer()):
            raise ValueError("low and high of an int dimension must be whole numbers")
        return self


class Tune(Section):
    """The search for hyper-parameters: Optuna on a laptop, Katib on a cluster, from one search space."""

    enabled: bool = True
    """Search; if false, train takes the parameters as they are."""
    trials: int = Field(default=6, ge=1)
    """Number of trials."""
    sampler: Literal["grid", "random", "tpe", "gp"] = "tpe"
    """Search algorithm (Katib: grid, random, tpe, bayesianoptimization)."""
    pruner: Literal["none", "median", "hyperband"] = "median"
    """Stops trials that fall behind."""
    space: dict[str, Dimension] = Field(default={"train.lr": Dimension(type="float", low=3e-4, high=3e-2, log=True)})
    """Dotted parameter -> its dimension."""
    metric: Annotated[str, AfterValidator(one_of(METRICS))] = "val_accuracy"
    """Metric of the validation split to optimise: val_accuracy and val_macro_f1 (maximize), val_loss,
    val_bits_per_byte and val_perplexity (minimize; the last two for language models)."""
    direction: Literal["maximize", "minimize"] = "maximize"
    """Whether more or less of the metric is better."""
    epochs: int = Field(default=0, ge=0)
    """Epochs of a trial; 0 takes train.epochs."""
    max_steps: int = Field(default=0, ge=0)
    """Steps of a trial; 0 takes train.max_steps."""
    rows: int = Field(default=0, ge=0)
    """Training rows of a trial; 0 takes all."""
    seed: int = Field(default=0, ge=0)
    """Seed of the sampler."""
    timeout_s: float = Field(default=0.0, ge=0.0)
    """Start no trial after this many seconds; 0 has no limit."""

    @model_validator(mode="after")
    def _direction(self) -> Self:
        if self.enabled and self.direction != METRICS[self.metric]:
            raise ValueError(f"direction must be {METRICS[self.metric]} for {self.metric} (given {self.direction})")
        return self


class Distill(Section):
    """A small student learns from the trained teacher (Hinton et al. 2015)."""

    enabled: bool = True
    """Distil; if false, the trained model itself is passed on."""
    temperature: float = Field(default=2.0, gt=0.0, le=100.0)
    """Softens teacher and student distributions."""
    alpha: float = Field(default=0.7, ge=0.0, le=1.0)
    """Weight of the teacher's distribution; 1 - alpha is the weight of the labels."""
    student: Model = NgramBag(buckets=16384, dim=32)
    """The student, written like the section `model`."""
    teachers: tuple[str, ...] = ()
    """URIs of further teachers: with the trained model they form an ensemble."""
    weights: tuple[Annotated[float, Field(gt=0.0)], ...] = ()
    """Weight of the trained model and of each further teacher; empty weighs them alike."""
    epochs: int = Field(default=0, ge=0)
    """Epochs of the student; 0 takes train.epochs."""
    lr: float = Field(default=0.0, ge=0.0)
    """Peak rate of the student; 0 takes the teacher's."""

    @model_validator(mode="after")
    def _weights_match(self) -> Self:
        if self.weights and len(self.weights) != len(self.teachers) + 1:
            raise ValueError(
                f"weights has {len(self.weights)} entries; it needs {len(self.teachers) + 1}: the model and each teacher"
            )
        return self


class Prune(Section):
    """Magnitude pruning on the cubic schedule (Zhu and Gupta 2017)."""

    target: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of weights set to zero at the end; 0 does not prune."""
    begin: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the fine-tuning steps after which pruning starts."""
    end: float = Field(default=0.7, gt=0.0, le=1.0)
    """Share of the fine-tuning steps at which the target is reached."""
    every: int = Field(default=10, ge=1)
    """Steps between prunings."""
    epochs: int = Field(default=1, ge=1)
    """Epochs of fine-tuning while pruning."""
    lr: float = Field(default=0.0, ge=0.0)
    """Peak rate of the fine-tuning; 0 takes a tenth of train.lr."""
    scope: Literal["global", "tensor"] = "global"
    """`global` prunes the smallest weights of all matrices together, `tensor` of each matrix by itself."""

    @model_validator(mode="after")
    def _order(self) -> Self:
        if self.begin >= self.end:
            raise ValueError(f"begin ({self.begin}) must be below end ({self.end})")
        return self


class Quantize(Section):
    """Pruning, int8 quantisation and export, each validated right after."""

    enabled: bool = True
    """Quantise to int8; if false, the model is only exported."""
    prune: Prune = Prune()
    serve: Literal["onnx-dynamic", "onnx-static"] = "onnx-dynamic"
    """Which int8 model becomes model.onnx, the one that is served and judged."""
    torchao: bool = True
    """Also quantise with torchao and report it in the table."""
    calibration_rows: int = Field(default=256, ge=1)
    """Rows of the train split used to calibrate static quantisation."""
    temperature: bool = True
    """Scale a classifier's logits so that its probabilities fit the validation split."""


class Evaluate(Section):
    """The final test, beside a baseline, with significance."""

    baseline: bool = True
    """Fit and measure the baseline."""
    bootstrap: int = Field(default=2000, ge=100, le=1_000_000)
    """Resamples of the paired bootstrap."""
    confidence: float = Field(default=0.95, gt=0.0, lt=1.0)
    """Level of the confidence intervals."""
    latency_runs: int = Field(default=200, ge=10)
    """Timed predictions at batch size 1."""
    examples: int = Field(default=12, ge=0)
    """Right and wrong examples shown in the report."""
    folds: int = Field(default=0, ge=0, le=50)
    """Cross-validate the training recipe on this many stratified folds as well; 0 does not."""
    bins: int = Field(default=15, ge=2)
    """Bins of the expected calibration error."""
    seed: int = Field(default=0, ge=0)
    """Seed of the bootstrap and of the choice of examples."""


class Promote(Section):
    """The registry and the gate before it."""

    registry: str = Field(default="registry", min_length=1)
    """URI of the registry."""
    model: str = Field(default="default", pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")
    """Name of the model in the registry."""
    alpha: float = Field(default=0.01, gt=0.0, lt=1.0)
    """Significance level at which the candidate must beat the champion, or the baseline if there is no champion."""
    max_bytes: int = Field(default=0, ge=0)
    """Refuse a served model larger than this; 0 has no limit."""
    max_latency_ms: float = Field(default=0.0, ge=0.0)
    """Refuse a served model whose median latency at batch 1 is higher than this; 0 has no limit."""
