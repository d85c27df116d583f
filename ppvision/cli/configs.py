"""`ppvision configs`."""

import argparse

from ppvision.cli.options import Verbs, add_verb
from ppvision.console import show
from ppvision.errors import InputError


def add(verbs: Verbs) -> None:
    verb = add_verb(
        verbs,
        "configs",
        "list and copy the configs that come with the package",
        "List the packaged configs, which --config finds by name, or copy one.",
        "ppvision configs --copy pale_nano_digits --output configs/mine.yml",
    )
    verb.add_argument("--copy", metavar="NAME", help="the config to copy (default: list all)")
    verb.add_argument(
        "--output",
        help="with --copy: a folder, which gets TASK/NAME.yml, or the new file, NAME.yml",
    )
    verb.set_defaults(verb=run)


def run(args: argparse.Namespace) -> None:
    from ppvision.configs import copy_config, list_configs

    if (args.copy is None) != (args.output is None):
        raise InputError("configs: expected --copy and --output together, or neither.")
    if args.copy is None:
        show("\n".join(list_configs()))
        return
    show("\n".join(map(str, copy_config(args.copy, args.output))))
