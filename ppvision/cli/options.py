"""Options that several verbs share, and the format of the help."""

import argparse

from ppvision.data.limits import DEFAULT_MAX_PIXELS, MAX_PIXELS
from ppvision.errors import InputError, shorten
from ppvision.precision import LONG_SPELLINGS, PRECISIONS

# The type that `add_subparsers` returns.
Verbs = argparse._SubParsersAction

EXAMPLE_CONFIG = "configs/segmentation/segformer_pale_nano_digit_scenes.yml"


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows the default of every argument that has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        hidden = (None, False, argparse.SUPPRESS)
        if not action.option_strings or any(action.default is value for value in hidden):
            return text
        if action.default == []:  # a flag that may be repeated
            return text
        # The words of a list, also None, as a user types them on the command line.
        default = action.default
        shown = " ".join(map(str, default)) if isinstance(default, list) else "%(default)s"
        return f"{text} (default: {shown})".lstrip()


class Parser(argparse.ArgumentParser):
    """A parser that accepts only whole flags and starts its help with a description of the
    command."""

    def __init__(self, **options) -> None:
        super().__init__(**options, allow_abbrev=False, formatter_class=_HelpFormatter)

    def format_help(self) -> str:
        return f"{self.description}\n\n" + super().format_help().replace(
            f"{self.description}\n\n", "", 1
        )


def add_verb(
    verbs: Verbs, name: str, short: str, sentence: str, example: str
) -> argparse.ArgumentParser:
    """Add a verb whose help has a sentence, an example and the defaults."""
    verb = verbs.add_parser(
        name,
        help=short,
        description=sentence,
        epilog=f"example:\n  {example}",
    )
    verb.add_argument(
        "--verbose",
        action="store_true",
        help="show all output of the libraries, and every line of the log",
    )
    verb.set_defaults(name_of_verb=name)
    return verb


def add_config(verb: argparse.ArgumentParser, required: bool = True) -> None:
    verb.add_argument(
        "-c",
        "--config",
        required=required,
        help="YAML file, or a name that `ppvision configs` lists",
    )
    verb.add_argument(
        "-o", "--opts", nargs="+", metavar="KEY=VALUE", help="change values of the config"
    )
    verb.add_argument("--device", default="cpu", help="device to compute on: cpu, gpu or gpu:N")
    verb.add_argument(
        "--allow_download",
        action="store_true",
        help="download `pretrained` weights if the config gives a URL",
    )


def add_model(verb: argparse.ArgumentParser) -> None:
    add_precision(verb)
    verb.add_argument("--bits", type=parse_bits, help="bit-width to use, if the model has several")
    add_slim_config(verb)
    model = verb.add_mutually_exclusive_group(required=True)
    model.add_argument(
        "--model_path",
        help="weights: .pdparams, .safetensors or a layered model; Paddle runs them in eager mode",
    )
    model.add_argument(
        "--model_dir", help="exported folder; Paddle Inference or ONNX Runtime runs it"
    )


def add_precision(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--precision",
        choices=[*PRECISIONS, *LONG_SPELLINGS],
        metavar="P",
        default="auto",
        help="precision of an exported folder: auto, float32, bfloat16 or int8",
    )


def check_precision_flag(args: argparse.Namespace) -> None:
    if args.precision != "auto" and not args.model_dir:
        raise InputError(
            f"--precision {args.precision}: applies to an exported folder only. Pass --model_dir."
        )


def add_slim_config(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--slim_config", help="YAML file that describes the quantisation (docs/layered.md)"
    )


def add_max_pixels(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--max_pixels",
        type=parse_positive,
        metavar="N",
        help=f"largest image to read, in pixels (default: ${MAX_PIXELS} or {DEFAULT_MAX_PIXELS})",
    )


def add_skip_check(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--skip_check", action="store_true", help="do not check the data set first")


def add_workers(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--num_workers",
        type=parse_count,
        default=0,
        help="processes that read data; 0: the main process reads",
    )


def add_json(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--json", action="store_true", help="print one JSON document to stdout")


def parse_size(text: str) -> int | None:
    """Return a length in pixels, or None if the text is None or -1 (not fixed)."""
    if text.lower() in ("none", "-1"):
        return None
    try:
        value = int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"expected a number or None, got {shorten(text)}"
        ) from error
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {value}")
    return value


def parse_positive(text: str) -> int:
    value = parse_size(text)
    if value is None:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text}")
    return value


def parse_bits(text: str) -> int:
    value = parse_positive(text)
    if value > 8:
        raise argparse.ArgumentTypeError(f"expected 1 to 8, got {value}")
    return value


def parse_count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {shorten(text)}")
    return int(text)


def parse_rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a number, got {shorten(text)}") from error
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value
