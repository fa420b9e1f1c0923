"""What the Kubeflow Pipelines UI shows of each stage, made from its artifacts.

    summary(stage, inputs, outputs, metrics)   a page of Markdown that explains the stage by itself
    pages(stage, outputs)                      HTML pages that the stage wrote
    classification(outputs)                    confusion matrix and ROC curve of an evaluation
    metrics(stage, metrics, outputs)           scalars under stable names, to compare runs by

Functions of folders: they write nothing, and import no torch and no kfp. A file that is missing or broken leaves out
what would have been shown of it; a page never fails a stage that is done.
"""

from __future__ import annotations

from trainer.views.curves import classification
from trainer.views.page import pages, summary
from trainer.views.scalars import metrics

__all__ = ["classification", "metrics", "pages", "summary"]
