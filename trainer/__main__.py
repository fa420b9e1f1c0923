"""Run a stage: the only entry point of every image.

python -m trainer STAGE --params params.yaml --in NAME=URI --out NAME=URI [section.key=value ...]
python -m trainer STAGE --executor-input '{{$}}'          # inside Kubeflow Pipelines
python -m trainer trial --params env:MILLRACE_PARAMS --in dataset=URI train.lr=0.01   # for Katib
python -m trainer configure --executor-input '{{$}}'      # before the stages; finish: after them
python -m trainer doctor                                  # is this machine, or image, fit to run stages?
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence

from trainer import __version__, log, plugins
from trainer.config.names import nearest
from trainer.errors import EXIT_CODES, EXIT_FAILURE, EXIT_OK, ConfigError, GateRefused, MillraceError, redact
from trainer.stage import STAGES, Stage, execute

# What a pipeline runs around its stages: name -> what it does and the module with its `run(executor_input, overrides)`.
AROUND = {
    "configure": ("check the run form, find the data's version and what there is to do", "trainer.configure"),
    "finish": ("clean up after a run and tell people how it ended", "trainer.finish"),
}
OPTIONS = (
    "--params",
    "--in",
    "--out",
    "--scratch",
    "--executor-input",
    "--log-format",
    "--print-config",
    "--allow-refusal",
    "--retries",
    "--backoff",
)


def build_parser() -> argparse.ArgumentParser:
    """The command line, printed from the stage table."""
    codes = "\n".join(f"  {code:>3}  {meaning}" for code, meaning in EXIT_CODES.items())
    parser = argparse.ArgumentParser(
        prog="python -m trainer",
        description="Run one stage of the pipeline.",
        epilog=f"exit codes:\n{codes}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"millrace {__version__}")
    stages = parser.add_subparsers(dest="stage", metavar="STAGE", required=True)
    for stage in STAGES.values():
        sub = stages.add_parser(
            stage.name,
            help=stage.help,
            description=f"{stage.help[0].upper()}{stage.help[1:]}.",
            epilog=describe_ports(stage),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,  # `--retr 1` would not be taken from the command line of the child that is retried
        )
        sub.add_argument(
            "--params", metavar="FILE", help="params.yaml, or env:NAME for the text in a variable; else the defaults"
        )
        sub.add_argument("--in", dest="inputs", metavar="NAME=URI", action="append", default=[], help="an input folder")
        sub.add_argument(
            "--out", dest="outputs", metavar="NAME=URI", action="append", default=[], help="an output folder"
        )
        sub.add_argument(
            "--scratch", metavar="DIR", default="", help="folder for checkpoints and journals that outlive a kill"
        )
        sub.add_argument(
            "--executor-input", metavar="JSON", default="", help="inputs, outputs and parameters as KFP gives them"
        )
        sub.add_argument(
            "--log-format", choices=("text", "json"), default="text", help="lines for people or for machines"
        )
        sub.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
        sub.add_argument(
            "--allow-refusal", action="store_true", help="exit with 0 when a gate refuses: the output says so"
        )
        sub.add_argument(
            "--retries", metavar="N", type=int, default=0, help="run again so often after a signal killed the stage"
        )
        sub.add_argument(
            "--backoff", metavar="S", type=float, default=10.0, help="seconds before the first retry (default: 10)"
        )
        sub.add_argument("overrides", metavar="section.key=value", nargs="*", help="override a parameter")
    for name, (text, _) in AROUND.items():
        sub = stages.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        sub.add_argument("--executor-input", metavar="JSON", required=True, help="parameters as KFP gives them")
        sub.add_argument(
            "--log-format", choices=("text", "json"), default="text", help="lines for people or for machines"
        )
        sub.add_argument("overrides", metavar="section.key=value", nargs="*", help="override a parameter")
    text = "train once with some values and print the metric, for Katib"
    sub = stages.add_parser("trial", help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False)
    sub.add_argument("--params", metavar="FILE", required=True, help="params.yaml, or env:NAME")
    sub.add_argument("--in", dest="inputs", metavar="NAME=URI", action="append", default=[], help="dataset=URI")
    sub.add_argument("overrides", metavar="section.key=value", nargs="*", help="a value of the trial")
    sub.set_defaults(log_format="text")
    text = "say what this machine or image can run, and what is wrong with it"
    sub = stages.add_parser(
        "doctor", help=text, description=f"{text[0].upper()}{text[1:]}; exit with 2 if anything is."
    )
    sub.add_argument("--json", action="store_true", help="print one JSON object")
    sub.set_defaults(overrides=[], log_format="text")
    return parser


def describe_ports(stage: Stage) -> str:
    """Lines that list a stage's inputs, outputs and parameter sections."""
    lines = []
    for title, ports in (("inputs", stage.inputs), ("outputs", stage.outputs)):
        if ports:
            lines.append(f"{title}:")
            lines += [
                f"  {name:<12}{'(optional) ' if port.optional else ''}{port.help}" for name, port in ports.items()
            ]
    lines.append(f"sections of params.yaml: {', '.join(stage.sections)}")
    return "\n".join(lines)


def parse_ports(words: Sequence[str], flag: str) -> dict[str, str]:
    """`["dataset=out/dataset"]` -> {"dataset": "out/dataset"}.

    Raises:
        ConfigError: a word is not NAME=URI, or a name is given twice.
    """
    ports: dict[str, str] = {}
    for word in words:
        name, sep, uri = word.partition("=")
        if not sep or not name or not uri:
            raise ConfigError(f"{flag} {word!r} is not of the form NAME=URI", f"for example {flag} dataset=out/dataset")
        if name in ports:
            raise ConfigError(f"{flag} {name} is given twice", "give it once")
        ports[name] = uri
    return ports


def run_stage(args: argparse.Namespace) -> int:
    """Run the stage that the command line names; returns the exit status."""
    try:
        return _run_stage(args)
    except GateRefused as error:
        if not args.allow_refusal:
            raise
        log.say(f"refused: {error.message}")
        return EXIT_OK


def _run_stage(args: argparse.Namespace) -> int:
    from trainer.config.load import dump, load

    if args.executor_input:
        from trainer import executor

        if not args.print_config:
            return executor.run(args.stage, args.executor_input, args.overrides, args.scratch)
        params = executor.parameters(args.executor_input, args.overrides)
    else:
        params = load(args.params, args.overrides)
    if args.print_config:
        print(dump(params), end="")
        return EXIT_OK
    execute(args.stage, params, parse_ports(args.inputs, "--in"), parse_ports(args.outputs, "--out"), args.scratch)
    return EXIT_OK


def report_error(error: BaseException) -> int:
    """Print an error for a person, or as a JSON object, on stderr; returns its exit status."""
    if isinstance(error, MillraceError):
        message, fix, status, text = error.message, error.hint, error.exit_code, str(error)
    else:
        message, fix = redact(f"{type(error).__name__}: {error}"), "this is a bug or the machine; see the traceback"
        status, text = EXIT_FAILURE, f"{message}\n  fix: {fix}"
        print(redact("".join(traceback.format_exception(error))), end="", file=sys.stderr)
    if log.is_json():
        print(json.dumps({"message": "error", "error": message, "fix": fix, "exit_code": status}), file=sys.stderr)
    else:
        print(f"error: {text}", file=sys.stderr)
    return status


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; overrides may stand anywhere among the options."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if options := [word for word in rest if word.startswith("-") or "=" not in word]:
        parser.error(f"unrecognized arguments: {' '.join(options)}; {nearest(options[0], OPTIONS)}")
    args.overrides += rest
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status that `trainer.errors` lists."""

    def run() -> int:
        args = parse_args(argv)
        log.configure(args.log_format)
        # The kernel gives the first process of a container no default action for signals: SIGTERM would do nothing.
        if getattr(args, "retries", 0) > 0 or os.getpid() == 1:
            from trainer.supervise import supervise, without

            words = list(sys.argv[1:] if argv is None else argv)
            retries, backoff_s = getattr(args, "retries", 0), getattr(args, "backoff", 0.0)
            return supervise(without(words, ("--retries", "--backoff")), retries, max(backoff_s, 0.0))
        if args.stage == "doctor":
            from trainer import doctor

            return doctor.run(args.json)
        if args.stage in AROUND:
            around: Callable[..., int] = plugins.load(f"{AROUND[args.stage][1]}:run")
            return around(args.executor_input, args.overrides)
        if args.stage == "trial":
            from trainer.config.load import load
            from trainer.tune import trial

            return trial.run(load(args.params, args.overrides), parse_ports(args.inputs, "--in"))
        # OpenMP's idle threads spin for milliseconds by default, which slows training tenfold on shared cores.
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")
        return run_stage(args)

    return exit_status(run)


def exit_status(run: Callable[[], int]) -> int:
    """Call an entry point's work; returns its exit status, or the one that what ended it means."""
    try:
        try:
            return run()
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # Whoever read our output has gone; the flush at exit must not complain about it once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:
        return report_error(error)


if __name__ == "__main__":
    sys.exit(main())
