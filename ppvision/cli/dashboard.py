"""`ppvision dashboard`."""

import argparse

from ppvision.cli.options import Verbs, add_verb
from ppvision.engine.dashboard_arguments import add_dashboard_arguments


def add(verbs: Verbs) -> None:
    verb = add_verb(
        verbs,
        "dashboard",
        "VisualDL over runs",
        "Show runs that were trained with --use_vdl in VisualDL, until Ctrl+C.",
        "ppvision dashboard output/mine",
    )
    add_dashboard_arguments(verb)
    verb.set_defaults(verb=run)


def run(args: argparse.Namespace) -> int:
    from ppvision.engine.dashboard import serve_runs

    return serve_runs(args.runs, args.host, args.port, args.public_path)
