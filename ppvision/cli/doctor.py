"""`ppvision doctor`."""

import argparse

from ppvision.cli.options import Verbs, add_verb
from ppvision.console import find_result_stream, tell


def add(verbs: Verbs) -> None:
    verb = add_verb(
        verbs,
        "doctor",
        "check the installation",
        "Check the installation: versions, conflicts, and what will not work.",
        "ppvision doctor",
    )
    verb.set_defaults(verb=run)


def run(args: argparse.Namespace) -> int:
    from ppvision.doctor import run_doctor

    tell("doctor: reading versions, trying imports and a small export")
    return run_doctor(find_result_stream())
