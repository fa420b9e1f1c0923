"""`millrace plan`: what a run takes before a GPU is asked for."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path

from pipelines import project
from pipelines.screen import Paint
from trainer import presets
from trainer.config.load import apply_overrides, parse_override, read_tree, validate
from trainer.config.text import parse_yaml
from trainer.errors import EXIT_OK, ConfigError
from trainer.parallel.gpus import gpu
from trainer.planner import report
from trainer.planner.layout import configured
from trainer.planner.search import problem_of

# What the search decides unless it is given on the command line.
SEARCHED = ("parallel.", "train.batch_size", "train.accumulation", "train.recompute.mode")


def plan(args: Namespace) -> int:
    """`millrace plan`."""
    name = args.preset or project.PARAMS
    tree = parse_yaml(presets.text(name), name) if args.preset else read_tree(Path(project.PARAMS))
    params = validate(apply_overrides(tree, args.overrides), name)
    given = {key: value for key, value in map(parse_override, args.overrides) if key.startswith(SEARCHED)}
    kind, per_node = gpu(args.gpu), args.gpus_per_node or params.cluster.gpus_per_node or 8
    if args.gpus < 1 or (args.gpus > per_node and args.gpus % per_node):
        raise ConfigError(
            f"--gpus {args.gpus}: not whole nodes of {per_node}", "give a multiple, or say --gpus-per-node"
        )
    if args.tokens and args.steps:
        raise ConfigError("--tokens and --steps: both given", "one follows from the other: leave one out")
    problem = problem_of(params, kind, args.gpus, per_node, args.global_batch, given)
    layout = configured(params, args.gpus) if args.check else None
    tokens = report.parse_count(args.tokens, "--tokens") if args.tokens else None
    if args.steps:
        sequences = layout.sequences if layout else problem.batch
        tokens = report.parse_count(args.steps, "--steps") * sequences * problem.shape.length
    found = report.plan(problem, tokens, args.price, layout)
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        print("\n".join(report.lines(found, name, Paint(sys.stdout))))
    return EXIT_OK
