"""Start jobs of a cluster and wait for them: the entry point of the launcher's image.

python -m components.launch train --executor-input '{{$}}'                  # a step of Kubeflow Pipelines
python -m components.launch train --params params.yaml --in dataset=URI --out model=URI [section.key=value ...]
python -m components.launch chain --params params.yaml                     # all stages, without Kubeflow Pipelines
python -m components.launch clean --run RUN                                # delete all that a run has made
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType

from trainer import __version__, log
from trainer.__main__ import OPTIONS, exit_status, parse_ports
from trainer.config.names import nearest
from trainer.errors import EXIT_CODES, EXIT_OK

LAUNCHED = {"train": "train as a PyTorchJob or TrainJob", "tune": "search as an Experiment of Katib"}


def build_parser() -> argparse.ArgumentParser:
    """The command line; its words are those of `python -m trainer`."""
    from components.launch import chain

    codes = "\n".join(f"  {code:>3}  {meaning}" for code, meaning in EXIT_CODES.items())
    parser = argparse.ArgumentParser(
        prog="python -m components.launch",
        description="Start jobs of a Kubernetes cluster and wait for them.",
        epilog=f"exit codes, of the launcher and of the stage that it waits for:\n{codes}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"millrace {__version__}")
    verbs = parser.add_subparsers(dest="name_of_verb", metavar="VERB", required=True)
    for stage, text in LAUNCHED.items():
        sub = _verb(verbs, stage, f"{text}, and wait for its end")
        sub.add_argument("--executor-input", metavar="JSON", default="", help="inputs, outputs and parameters from KFP")
        sub.add_argument("--params", metavar="FILE", help="params.yaml, or env:NAME of the variable that holds it")
        sub.add_argument("--in", dest="inputs", metavar="NAME=URI", action="append", default=[], help="an input folder")
        sub.add_argument(
            "--out", dest="outputs", metavar="NAME=URI", action="append", default=[], help="an output folder"
        )
        sub.add_argument(
            "--namespace", metavar="NS", default="", help="where the job runs (default: that of the login)"
        )
        sub.add_argument("--name", metavar="NAME", default="", help="of the job (default: made from its output)")
        sub.add_argument("--run", metavar="RUN", default="", help="the run that it belongs to, for `clean`")
        sub.add_argument("--detach", action="store_true", help="leave the job running when a signal ends the launcher")
        sub.set_defaults(verb=_launch)
    sub = _verb(verbs, "finish", "the last step of a pipeline: delete what still runs, clean up and tell people")
    sub.add_argument("--executor-input", metavar="JSON", required=True, help="parameters as KFP gives them")
    sub.set_defaults(verb=_finish)
    sub = _verb(verbs, "clean", "delete all jobs of a run, ended or not, and wait until they are gone")
    sub.add_argument("--run", metavar="RUN", required=True, help="the run")
    sub.add_argument("--namespace", metavar="NS", default="", help="where it ran (default: that of the login)")
    sub.set_defaults(verb=_clean)
    chain.add_parser(verbs)
    return parser


def _verb(verbs: argparse._SubParsersAction[argparse.ArgumentParser], name: str, text: str) -> argparse.ArgumentParser:
    sub = verbs.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False)
    sub.add_argument("--log-format", choices=("text", "json"), default="text", help="lines for people or for machines")
    if name != "clean":
        sub.add_argument("overrides", metavar="section.key=value", nargs="*", help="override a parameter")
    return sub


def _launch(args: argparse.Namespace) -> int:
    if args.executor_input:
        from components.launch import kfp

        return kfp.run(args.name_of_verb, args.executor_input, args.overrides)
    import os

    from components.launch import asked, stages, submit
    from components.launch.api import Api
    from trainer.config.load import load

    params = load(args.params, args.overrides)
    api = Api.connect(args.namespace)
    # An owner in another namespace does not exist there: the job would be deleted as soon as it is made.
    here = not args.namespace or api.namespace == Api.connect().namespace
    job = asked.Asked(
        args.name_of_verb, params, parse_ports(args.inputs, "--in"), parse_ports(args.outputs, "--out"),
        name=args.name, run=args.run, owner=submit.step_owner(os.environ) if here else None,
    )  # fmt: skip
    stages.run(api, job, detach=args.detach).check()
    return EXIT_OK


def _finish(args: argparse.Namespace) -> int:
    from components.launch import finish

    return finish.run(args.executor_input, args.overrides)


def _clean(args: argparse.Namespace) -> int:
    from components.launch import finish
    from components.launch.api import Api

    finish.sweep(Api.connect(args.namespace), args.run, ended=True)
    return EXIT_OK


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; overrides may stand anywhere among the options."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    known = (*OPTIONS, "--namespace", "--name", "--run", "--detach")
    if options := [word for word in rest if word.startswith("-") or "=" not in word]:
        parser.error(f"unrecognized arguments: {' '.join(options)}; {nearest(options[0], known)}")
    if rest and not hasattr(args, "overrides"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}; {args.name_of_verb} takes no parameters")
    if rest:
        args.overrides += rest
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status that `trainer.errors` lists."""
    # The kernel gives the first process of a container no default action for signals: without a handler of our own,
    # SIGTERM would do nothing until the job is started, which has handlers that take it away.
    signal.signal(signal.SIGTERM, _end)

    def run() -> int:
        args = parse_args(argv)
        log.configure(getattr(args, "log_format", "text"))
        verb: Callable[[argparse.Namespace], int] = args.verb
        return verb(args)

    return exit_status(run)


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
