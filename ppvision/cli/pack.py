"""`ppvision pack`."""

import argparse
from pathlib import Path

from ppvision.cli.opening import open_job, raise_on_signals, set_device
from ppvision.cli.options import (
    EXAMPLE_CONFIG,
    Verbs,
    add_config,
    add_max_pixels,
    add_slim_config,
    add_verb,
)
from ppvision.console import show
from ppvision.errors import InputError


def add(verbs: Verbs) -> None:
    verb = add_verb(
        verbs,
        "pack",
        "a trained model as layers of bits",
        "Write a trained model as layers of bits, or say what such a model holds.",
        f"ppvision pack -c {EXAMPLE_CONFIG} \\\n"
        "      --ptq --model_path segformer_pale_nano.digit_scenes --output mine.layered",
    )
    add_config(verb, required=False)
    verb.add_argument(
        "--model_path", help="checkpoint of a once-QAT training; with --ptq: float weights"
    )
    verb.add_argument("--output", help="folder of the layered model")
    verb.add_argument("--ptq", action="store_true", help="quantise float weights without training")
    verb.add_argument(
        "--calibration",
        help="with --ptq: folder of images, for the statistics and the activations (default for "
        "--activations: the training set)",
    )
    verb.add_argument(
        "--activations",
        type=int,
        choices=[8],
        help="with --ptq: also quantise the inputs of layers to 8 bits",
    )
    verb.add_argument(
        "--info",
        help="print the content of a layered model: a folder, a URL or a name from the zoo",
    )
    add_slim_config(verb)
    add_max_pixels(verb)
    verb.set_defaults(verb=run)


@raise_on_signals()
def run(args: argparse.Namespace) -> None:
    from ppvision.quant import describe_layered

    if args.info:
        show(describe_layered(_find_layered(args.info)))
        return
    for flag in ("config", "model_path", "output"):
        if getattr(args, flag) is None:
            raise InputError(f"pack: expected --{flag}, got none. Pass it, or only --info.")
    if args.calibration and not args.ptq:
        raise InputError(
            "--calibration: applies to --ptq only. A trained model needs no calibration; omit it."
        )
    if args.activations is not None and not args.ptq:
        raise InputError(
            "--activations: applies to --ptq only. For a trained model, slim_config decides. "
            "Omit --activations."
        )
    set_device("cpu")
    from ppvision.tasks.multibit.packing import pack_checkpoint

    folder = pack_checkpoint(
        open_job(args),
        args.model_path,
        args.output,
        ptq=args.ptq,
        calibration=args.calibration,
        activations=args.activations is not None,
    )
    show(describe_layered(folder))


def _find_layered(source: str) -> str | Path:
    """Return a folder or URL unchanged; for a name from the zoo, return the folder of its
    weights."""
    from ppvision.zoo.cards import find_card

    card = None if Path(source).exists() else find_card(source)
    return source if card is None or card.package else card.folder
