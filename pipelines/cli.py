"""The command line: `millrace COMMAND`. Help texts come from the stage table and the schema.

Starts in well under half a second: torch, DVC and the rest are imported by the command that needs them.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from pipelines import cli_checkpoint, cli_kfp, cli_render
from trainer import __version__
from trainer.errors import EXIT_CODES, ConfigError, redact


class Parser(argparse.ArgumentParser):
    """An argparse parser that offers the nearest name for a wrong one."""

    def error(self, message: str) -> NoReturn:
        """Print what is wrong and leave with 2."""
        self.print_usage(sys.stderr)
        print(f"error: {redact(message)}\n  fix: see `{self.prog} --help`", file=sys.stderr)
        raise SystemExit(2)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            from trainer.config.names import nearest

            kind = str(action.metavar or action.dest).lower()
            self.error(f"unknown {kind} {value!r}; {nearest(str(value), action.choices)}")


def build_parser() -> Parser:
    """The whole command line."""
    codes = "\n".join(f"  {code:>3}  {meaning}" for code, meaning in EXIT_CODES.items())
    parser = Parser(
        prog="millrace",
        description="Raw data in, a tuned, trained, distilled, quantised, evaluated and promoted model out.",
        epilog=f"exit codes:\n{codes}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"millrace {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, help: str, handler: str, **options: Any) -> Parser:
        sub: Parser = commands.add_parser(
            name, help=help, description=f"{help[0].upper()}{help[1:]}.", formatter_class=argparse.RawDescriptionHelpFormatter,
            **options,
        )  # fmt: skip
        sub.set_defaults(handler=handler)
        return sub

    _add_run(command)
    _add_new(command)
    _add_stage(command)
    _add_preset(command)
    _add_predict(command)
    _add_lr_find(command)
    _add_registry(command)
    cli_checkpoint.add_command(command)
    _add_report(command)
    _add_config(command)
    cli_kfp.add_commands(command)
    cli_render.add_command(command)
    _add_plan(command)
    _add_doctor(command)
    command("version", "print the version", "version")
    return parser


Command = Callable[..., Parser]


def _add_doctor(command: Command) -> None:
    sub = command(
        "doctor", "say what is wrong with this machine, or with the cluster, and how to put it right", "doctor"
    )
    sub.add_argument(
        "overrides",
        metavar="section.key=value",
        nargs="*",
        default=[],
        help="as if params.yaml said so (with --cluster)",
    )
    sub.add_argument("--cluster", action="store_true", help="also look at the cluster that KUBECONFIG names")
    sub.add_argument("--namespace", metavar="NAME", default="", help="where jobs run (default: that of the login)")
    sub.add_argument(
        "--system",
        metavar="NAME",
        default="kubeflow",
        help="where Katib and Kubeflow Pipelines are installed (default: kubeflow)",
    )
    sub.add_argument(
        "--account",
        metavar="NAME",
        default="",
        help="service account that starts the jobs (default: millrace-launcher)",
    )
    sub.add_argument("--store", metavar="URI", default="", help="store that pods write to (default: cluster.store)")
    sub.add_argument("--json", action="store_true", help="print JSON")


def _add_plan(command: Command) -> None:
    sub = command("plan", "say what training takes on GPUs: memory, mesh, days and cost; needs no GPU", "plan")
    sub.add_argument("--preset", metavar="NAME", default="", help="plan for a preset (default: params.yaml)")
    sub.add_argument("--gpus", metavar="N", type=_count, required=True, help="number of GPUs")
    sub.add_argument(
        "--gpu", metavar="KIND", default="h100",
        help="b200, h200, h100, a100-80, a100-40, l40s, l4, a10g, rtx4090, v100 or t4 (default: h100)",
    )  # fmt: skip
    sub.add_argument("--gpus-per-node", metavar="N", type=_count, default=0, help="default: as configured, else 8")
    sub.add_argument(
        "--global-batch", metavar="N", type=_count, default=0, help="sequences of a step (default: as configured)"
    )
    sub.add_argument("--tokens", metavar="N", default="", help="tokens to train on, such as 300B, for days and cost")
    sub.add_argument("--steps", metavar="N", default="", help="steps to train for (default: train.max_steps)")
    sub.add_argument("--price", metavar="USD", type=float, help="price of a GPU-hour (default: a range of the market)")
    sub.add_argument(
        "--check", action="store_true", help="take mesh and micro-batch as configured; exit with 2 if they do not fit"
    )
    sub.add_argument("--json", action="store_true", help="print JSON")
    sub.add_argument(
        "overrides",
        metavar="section.key=value",
        nargs="*",
        default=[],
        help="override a parameter; what is given of mesh and micro-batch stays as it is",
    )


def _add_run(command: Command) -> None:
    sub = command("run", "run what is not up to date, from raw data to a promoted model", "run")
    sub.add_argument(
        "overrides", metavar="section.key=value", nargs="*", default=[], help="set a parameter in params.yaml first"
    )
    sub.add_argument("--force", action="store_true", help="run all stages, changed or not")
    sub.add_argument("--until", metavar="STAGE", help="stop after this stage")
    sub.add_argument(
        "--engine",
        metavar="ENGINE",
        choices=("laptop", "docker", "kubernetes"),
        default="laptop",
        help="laptop: processes; docker: the images, by Docker or podman, always all stages; kubernetes: jobs of the "
        "cluster that KUBECONFIG names, without Kubeflow Pipelines (default: laptop)",
    )
    cluster = sub.add_argument_group("with --engine kubernetes (a RUN that is not named is the newest)")
    cluster.add_argument("--namespace", metavar="NAME", help="where its jobs run (default: that of the kubeconfig)")
    cluster.add_argument("--detach", action="store_true", help="start it and do not wait")
    for name, help in (
        ("attach", "come back to a run: Ctrl-C leaves it to itself"),
        ("resume", "go on with a run that failed or was stopped, with the parameters that it had"),
        ("cancel", "end a run and remove its jobs; what it stored stays"),
    ):
        cluster.add_argument(f"--{name}", metavar="RUN", nargs="?", const="", help=help)
    cluster.add_argument("--runs", action="store_true", help="list the runs")


def _add_new(command: Command) -> None:
    sub = command("new", "make a project of your own from a file of data", "new")
    sub.add_argument("folder", metavar="DIR", help="folder to make")
    sub.add_argument(
        "--data", metavar="FILE", required=True, help="CSV, JSONL, JSON, Parquet or text file, or a folder"
    )
    sub.add_argument("--text", metavar="COL", default="text", help="column that holds the text (default: text)")
    sub.add_argument("--label", metavar="COL", default="label", help="column that holds the label (default: label)")
    sub.add_argument(
        "--preset", metavar="NAME", default="text-classify", help="preset to start from (default: text-classify)"
    )
    sub.add_argument(
        "overrides", metavar="section.key=value", nargs="*", default=[], help="set a parameter in its params.yaml"
    )


def _add_stage(command: Command) -> None:
    # Only for the list of commands: `main` hands the words after `stage` to `python -m trainer`.
    sub = command("stage", "run one stage, exactly as its container does", "stage", add_help=False)
    sub.add_argument("words", metavar="STAGE ...", nargs=argparse.REMAINDER, help="see `millrace stage STAGE --help`")


def _add_preset(command: Command) -> None:
    sub = command("preset", "list, print or use a complete configuration", "preset")
    actions = sub.add_subparsers(dest="action", metavar="ACTION", required=True)
    actions.add_parser("ls", help="list the presets", description="List the presets.")
    show = actions.add_parser("show", help="print a preset", description="Print a preset.")
    use = actions.add_parser("use", help="write a preset to params.yaml", description="Write a preset to params.yaml.")
    for each in (show, use):
        each.add_argument("name", metavar="NAME", help="see `millrace preset ls`")
    use.add_argument("--force", action="store_true", help="replace a params.yaml that is not an unchanged preset")


def _add_predict(command: Command) -> None:
    sub = command("predict", "ask a model; a line of JSON for each input", "predict")
    sub.add_argument("texts", metavar="TEXT", nargs="*", help="inputs; without any, and without --file, lines of stdin")
    sub.add_argument("--file", metavar="FILE", help="a line each: a text, a picture's path, or a JSON object or text")
    sub.add_argument(
        "--text", metavar="KEY", default="text", help="key of JSON objects that holds the text (default: text)"
    )
    sub.add_argument(
        "--model", metavar="DIR", help="model folder (default: the registry's champion, else out/quantized)"
    )
    sub.add_argument("--batch-size", metavar="N", type=_count, default=64, help="inputs at once (default: 64)")


def _add_lr_find(command: Command) -> None:
    sub = command("lr-find", "find a learning rate: train for a moment on rates that grow (LR range test)", "lr_find")
    for flag, kind, default, help in (
        ("start-lr", float, 1e-6, "rate of the first step"),
        ("end-lr", float, 1.0, "rate of the last step"),
        ("num-iter", _count, 100, "steps"),
        ("smoothing", float, 0.8, "share of its neighbour in each smoothed loss, from 0 to below 1"),
        ("divergence", float, 4.0, "end when the loss is this many times the lowest one"),
    ):
        sub.add_argument(f"--{flag}", metavar="N", type=kind, default=default, help=f"{help} (default: {default})")
    sub.add_argument("--dataset", metavar="DIR", default="out/dataset", help="dataset folder (default: out/dataset)")
    sub.add_argument(
        "-o", "--output", metavar="FILE", default="out/lr-find.html", help="page to write (default: out/lr-find.html)"
    )
    sub.add_argument(
        "overrides", metavar="section.key=value", nargs="*", default=[], help="set a parameter; params.yaml is kept"
    )


def _add_registry(command: Command) -> None:
    sub = command("registry", "list, show, roll back or promote models", "registry")
    sub.add_argument(
        "--uri", metavar="URI", help="the registry (default: promote.registry of params.yaml, else registry)"
    )
    actions = sub.add_subparsers(dest="action", metavar="ACTION", required=True)
    actions.add_parser("ls", help="list versions", description="List versions.").add_argument(
        "model", metavar="MODEL", nargs="?", default="", help="only this model"
    )
    for name, help in (
        ("show", "print all about a version as JSON (default: the champion)"),
        ("rollback", "make an earlier version the champion (default: the one before)"),
        ("promote", "make a version the champion by hand, whatever the gate said"),
    ):
        each = actions.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.")
        model = "name of the model (default: promote.model of params.yaml, else the only one in the registry)"
        each.add_argument("model", metavar="MODEL", nargs="?", default="", help=model)
        each.add_argument("version", metavar="VERSION", nargs="?", default="", help="such as v0001")


def _add_report(command: Command) -> None:
    sub = command("report", "print the path of the last run's report", "report")
    sub.add_argument("--open", action="store_true", help="open it in the browser")


def _add_config(command: Command) -> None:
    sub = command("config", "print every parameter with its type, bounds, default and meaning", "config")
    sub.add_argument(
        "overrides",
        metavar="section.key=value",
        nargs="*",
        default=[],
        help="override a parameter (with --print-config)",
    )
    sub.add_argument("--print-config", action="store_true", help="print params.yaml as the stages will see it")
    sub.add_argument("--schema", action="store_true", help="print the JSON Schema of params.yaml, for editors")


def _count(word: str) -> int:
    try:
        value = int(word)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{word!r} is not a whole number above 0")
    return value


def _parse(words: list[str]) -> argparse.Namespace:
    """Parsed words; argparse alone takes no `section.key=value` after an option that follows another one."""
    parser = build_parser()
    args, rest = parser.parse_known_args(words)
    several = getattr(args, "overrides", None)
    several = getattr(args, "texts", None) if several is None else several
    if rest and (several is None or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if several is not None:
        several.extend(rest)
    return args


def _stage(words: list[str]) -> int:
    """`millrace stage`: the words go to `python -m trainer` as they are."""
    from trainer.__main__ import main as stage_main
    from trainer.__main__ import report_error
    from trainer.config.names import nearest
    from trainer.stage import STAGES

    if words and not words[0].startswith("-") and words[0] not in STAGES:
        return report_error(ConfigError(f"unknown stage {words[0]!r}; {nearest(words[0], STAGES)}", "correct the name"))
    return stage_main(words or ["--help"])


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status that `trainer.errors` lists."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["stage"]:
        return _stage(words[1:])
    args = _parse(words)
    from trainer.__main__ import exit_status

    elsewhere = {"render": cli_render.MODULE, "checkpoint": cli_checkpoint.MODULE}
    elsewhere |= {"lr_find": "pipelines.commands_lr", "plan": "pipelines.commands_plan"}
    modules = {**cli_kfp.COMMANDS, **elsewhere}
    module = modules.get(args.handler, "pipelines.commands")
    handler: Callable[[argparse.Namespace], int] = getattr(importlib.import_module(module), args.handler)
    return exit_status(lambda: handler(args))


if __name__ == "__main__":
    sys.exit(main())
