"""`ppvision configs`."""

import argparse

from ppvision.cli.options import Verbs, add_verb
from ppvision.console import show
from ppvision.errors import InputError


def add(verbs: Verbs) -> None:
    verb = add_verb(
        verbs,
        "configs",
        "list or copy the packaged configs",
        "List the packaged configs, or copy one. --config accepts their names.",
        "ppvision configs --copy pale_nano_digits --output configs/mine.yml",
    )
    verb.add_argument(
        "--copy", metavar="NAME", help="name of the config to copy (default: list all)"
    )
    verb.add_argument(
        "--output",
        help="with --copy: the new file, NAME.yml, or a folder, in which TASK/NAME.yml is written",
    )
    verb.set_defaults(verb=run)


def run(args: argparse.Namespace) -> None:
    from ppvision.configs import copy_config, list_configs

    if (args.copy is None) != (args.output is None):
        raise InputError(
            "configs: expected --copy and --output together, got one of them. Pass both."
        )
    if args.copy is None:
        show("\n".join(list_configs()))
        return
    show("\n".join(map(str, copy_config(args.copy, args.output))))
