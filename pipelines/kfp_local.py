"""What kfp.local 2.17 gets wrong about this pipeline, put right for the time of a run.

- It runs containers with `auto_remove` and takes one that has gone for one that did well, so that a failed container
  may be reported as green (kubeflow/pipelines#13332). Ours keeps it until its exit code is read. A kfp that asks for no
  `auto_remove` uses its own function again.
- It finds no output of a task in a condition unless the output is called `Output`, and then takes the condition for
  false: a pipeline that does nothing ends green. Ours finds it, and ends the run if it does not.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from pipelines.docker_runner import RunContainer, run_container
from trainer.errors import MillraceError

SUPPORTED = "install kfp>=2.17,<2.18"
_CHANNEL = "pipelinechannel--"


def upstream_is_fixed(function: RunContainer) -> bool:
    """Whether kfp's own function keeps a container until its exit code is read: it asks for no `auto_remove`."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return False
    words = [word for node in ast.walk(tree) if isinstance(node, ast.Call) for word in node.keywords]
    return not any(
        word.arg in ("auto_remove", "remove") and not (isinstance(word.value, ast.Constant) and not word.value.value)
        for word in words
    )


@contextmanager
def containers_by(run: Callable[[RunContainer, dict[str, Any]], int]) -> Iterator[None]:
    """Let kfp.local run each container by `run(function, arguments)`; the function is kfp's own, or ours if that errs.

    Raises:
        MillraceError: this kfp has no such function.
    """
    from kfp.local import docker_task_handler

    upstream = getattr(docker_task_handler, "run_docker_container", None)
    if upstream is None:
        import kfp

        raise MillraceError(f"kfp {kfp.__version__} runs containers in another way", SUPPORTED)
    function = upstream if upstream_is_fixed(upstream) else run_container
    docker_task_handler.run_docker_container = lambda **words: run(function, words)
    try:
        yield
    finally:
        docker_task_handler.run_docker_container = upstream


@contextmanager
def conditions_found(unresolved: Callable[[str], NoReturn]) -> Iterator[None]:
    """Let kfp.local find what its conditions read; what it does not find goes to `unresolved`, which must not return."""
    from kfp.local.orchestrator.enhanced_dag_orchestrator import ConditionEvaluator

    upstream: Callable[[str, Any], Any] = ConditionEvaluator._resolve_pipeline_channel

    def resolve(channel: str, store: Any) -> Any:
        value = upstream(channel, store)
        words = channel.removeprefix(_CHANNEL).split("-")
        for i in range(1, len(words) if value is None else 0):
            with suppress(ValueError, KeyError):
                value = store.get_task_output("-".join(words[:i]), "-".join(words[i:]))
        return unresolved("-".join(words)) if value is None else value

    ConditionEvaluator._resolve_pipeline_channel = staticmethod(resolve)
    try:
        yield
    finally:
        ConditionEvaluator._resolve_pipeline_channel = staticmethod(upstream)
