"""`ppvision check`."""

import argparse
from dataclasses import replace

from ppvision.cli.opening import open_job
from ppvision.cli.options import EXAMPLE_CONFIG, Verbs, add_config, add_max_pixels, add_verb
from ppvision.console import show, tell


def add(verbs: Verbs) -> None:
    verb = add_verb(
        verbs,
        "check",
        "check a data set: problems and contents",
        "Check every image and label of a data set. Print its problems and its contents.",
        f"ppvision check -c {EXAMPLE_CONFIG}",
    )
    add_config(verb)
    verb.add_argument(
        "--part",
        nargs="+",
        choices=["train_dataset", "val_dataset"],
        default=["train_dataset", "val_dataset"],
        metavar="PART",
        help="train_dataset, val_dataset or both",
    )
    add_max_pixels(verb)
    verb.set_defaults(verb=run)


def run(args: argparse.Namespace) -> None:
    job = open_job(args)
    summaries = job.check_data(*args.part)
    for part in args.part:
        if part not in summaries:
            tell(f"{part}: this type of data set cannot be checked")
            continue
        found = summaries[part]
        names = found.names or job.class_names
        counts = found.counts or []
        shown = replace(found, names=names) if len(names) == len(counts) else found
        show(f"{part}: {shown.table()}")
