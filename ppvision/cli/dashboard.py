"""`ppvision dashboard`."""

import argparse

from ppvision.cli.options import Verbs, add_verb
from ppvision.engine.dashboard_arguments import add_dashboard_arguments


def add(verbs: Verbs) -> None:
    verb = add_verb(
        verbs,
        "dashboard",
        "show runs in VisualDL",
        "Show runs in VisualDL until Ctrl+C. They must be trained with --use_vdl.",
        "ppvision dashboard output/mine",
    )
    add_dashboard_arguments(verb)
    verb.set_defaults(verb=run)


def run(args: argparse.Namespace) -> int:
    from ppvision.engine.dashboard import serve_runs

    return serve_runs(args.runs, args.host, args.port, args.public_path)
