"""`millrace doctor`: is this machine fit for the stages, and the cluster for what params.yaml asks of it?"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines import project
from trainer import doctor
from trainer.config.load import load
from trainer.errors import EXIT_BAD_INPUT, EXIT_OK


def run(cluster: bool, as_json: bool, overrides: Sequence[str] = (), **where: str) -> int:
    """Print facts, findings and notes.

    Args:
        cluster: also look at the cluster that KUBECONFIG names.
        as_json: for machines.
        overrides: words `section.key=value`: what is about to be run is looked at, not only what params.yaml says.
        where: namespace, system, account and store of `doctor_cluster.examine`.

    Returns:
        0, or 2 if something is wrong. Notes are about what stops nothing.

    Raises:
        MillraceError: the cluster cannot be asked.
    """
    report = doctor.examine()
    content: dict[str, Any] = {**report.facts}
    findings, notes = list(report.findings), []
    if cluster:
        from pipelines import doctor_cluster

        if not as_json:
            print(doctor.show(report), end="\n\n")
        params = load(project.PARAMS if Path(project.PARAMS).is_file() else None, overrides)
        look = doctor_cluster.examine(params, **where)
        content["cluster"] = look.facts
        findings, notes = findings + look.findings, look.notes
        if not as_json:
            print(doctor_cluster.show(look))
    elif not as_json:
        print(doctor.show(report))
    if as_json:
        for name, listed in (("findings", findings), ("notes", notes)):
            content[name] = [dataclasses.asdict(each) for each in listed]
        print(json.dumps({**content, "sane": not findings}))
    return EXIT_BAD_INPUT if findings else EXIT_OK
