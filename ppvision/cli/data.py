"""`ppvision data`."""

import argparse

from ppvision.cli.options import Verbs, add_max_pixels, add_verb, parse_count, parse_positive
from ppvision.console import show
from ppvision.errors import InputError

# Flags of `data` and the sets that have them.
_DATA_FLAGS = {
    "digit-scenes": ("count", "val_count", "size", "max_digits", "seed", "photos"),
    "digits": (),
    "dsb2018": ("source", "border"),
    "camvid": ("source",),
    "bccd": ("source",),
    "cifar10": ("source",),
}


def add(verbs: Verbs) -> None:
    verb = add_verb(
        verbs,
        "data",
        "make or convert a data set",
        "Make a data set of digits, or convert a data set that you have.",
        "ppvision data digit-scenes --output data/digit_scenes",
    )
    verb.add_argument("name", choices=list(_DATA_FLAGS), help="name of the data set")
    verb.add_argument("--output", required=True, help="folder to create")
    verb.add_argument("--source", help="your folder or file (not for digits, digit-scenes)")
    verb.add_argument(
        "--count", type=parse_positive, help="number of training scenes (default: 1200)"
    )
    verb.add_argument(
        "--val_count",
        type=parse_positive,
        help="number of validation scenes (default: a fifth of --count)",
    )
    verb.add_argument(
        "--size", type=parse_positive, help="height and width of a scene in pixels (default: 112)"
    )
    verb.add_argument(
        "--max_digits", type=parse_positive, help="largest number of digits per scene (default: 4)"
    )
    verb.add_argument("--seed", type=parse_count, help="digit-scenes: random seed (default: 0)")
    verb.add_argument(
        "--photos",
        help="folder of photographs for the background (default: two photographs of scikit-learn)",
    )
    verb.add_argument(
        "--border",
        type=parse_count,
        help="dsb2018: width in pixels of an extra class for borders of nuclei (default: 0, none)",
    )
    add_max_pixels(verb)
    verb.set_defaults(verb=run)


def run(args: argparse.Namespace) -> None:
    from ppvision.data.convert import CONVERTERS
    from ppvision.data.convert.digit_scenes import write_digit_scenes
    from ppvision.data.convert.digits import write_digits

    flags = sorted({flag for known in _DATA_FLAGS.values() for flag in known})
    given = {flag: getattr(args, flag) for flag in flags if getattr(args, flag) is not None}
    for flag in given:
        if flag not in _DATA_FLAGS[args.name]:
            known = ", ".join(f"--{f}" for f in _DATA_FLAGS[args.name]) or "only --output"
            raise InputError(f"data {args.name}: accepts {known}, got --{flag}. Omit it.")
    if args.name == "digit-scenes":
        summary = write_digit_scenes(args.output, **given)
    elif args.name == "digits":
        summary = write_digits(args.output)
    elif "source" not in given:
        raise InputError(f"data {args.name}: expected --source, your folder or file. Pass it.")
    else:
        summary = CONVERTERS[args.name](given.pop("source"), args.output, **given)
    show(f"{args.output}: {_describe_data(summary)}")


def _describe_data(summary: dict) -> str:
    """Describe in one line what a converter made; `dataset.json` has all of it."""
    parts = [f"{len(summary['classes'])} classes"]
    for part in ("train", "val"):
        counts = summary.get(part, {}).items()
        numbers = [f"{number} {name}" for name, number in counts if isinstance(number, int)]
        if numbers:
            parts.append(f"{part} {', '.join(numbers).replace('_', ' ')}")
    return "; ".join(parts)
