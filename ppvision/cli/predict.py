"""`ppvision predict`."""

import argparse
import signal
from collections.abc import Callable

from ppvision.cli.opening import device_kind, open_job, set_device
from ppvision.cli.options import (
    Verbs,
    add_config,
    add_max_pixels,
    add_model,
    add_verb,
    check_precision_flag,
    parse_positive,
)
from ppvision.console import show, tell, tell_last
from ppvision.environment import count_usable_cpus
from ppvision.errors import InputError, shorten, suggest_nearest


def add(verbs: Verbs) -> None:
    verb = add_verb(
        verbs,
        "predict",
        "predict images",
        "Predict images. Write the results as images and predictions.json.",
        "ppvision predict --model_dir inference/mine \\\n"
        "      --image_path data/digit_scenes/images/val",
    )
    add_config(verb, required=False)
    add_model(verb)
    verb.add_argument("--image_path", required=True, help="an image, a folder or a list file")
    verb.add_argument("--save_dir", default="output/predict", help="folder for the results")
    verb.add_argument(
        "--threads",
        type=parse_positive,
        default=count_usable_cpus(),
        help="CPU threads of the exported model",
    )
    add_max_pixels(verb)
    verb.set_defaults(verb=run)


def run(args: argparse.Namespace) -> int:
    from ppvision.engine.stopping import StopRequest

    set_device(args.device)
    with StopRequest() as stop:
        failures = _predict(args, lambda: stop.number != 0)
    if stop.number:
        name = signal.Signals(stop.number).name
        tell_last(f"ppvision: stopped by {name}: {args.save_dir}")
        return 128 + stop.number
    show(f"images and predictions.json: {args.save_dir}")
    for failure in failures:
        tell(f"not predicted: {_one_line(failure)}")
    return 1 if failures else 0


def _one_line(text: str) -> str:
    """Return text, possibly with a file name, without characters that control the terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _predict(args: argparse.Namespace, stopped: Callable[[], bool]) -> list[str]:
    """Predict until `stopped()`; write a line for every image that failed."""
    where = args.image_path, args.save_dir
    if args.config and not args.model_dir:
        check_precision_flag(args)
        job = open_job(args)
        model = job.load(args.model_path, args.bits)
        return job.predict_to_folder(model, *where, stopped=stopped)
    from ppvision.deploy import Predictor
    from ppvision.tasks.prediction import predict_exported

    job = open_job(args) if args.config else None
    how = {
        "threads": args.threads,
        "device": device_kind(args.device),
        "precision": args.precision,
    }
    predictor = Predictor(**_exported(args), **how)
    write = predict_exported if job is None else job.predict_exported_to_folder
    return write(predictor, *where, stopped=stopped)


def _exported(args: argparse.Namespace) -> dict[str, object]:
    """Return what `Predictor` runs without a config: `--model_dir`, or a whole model of the zoo."""
    if args.model_dir:
        if args.bits is not None:
            raise InputError("--bits: an exported folder has one width. Pass --model_path.")
        return {"folder": args.model_dir}
    from ppvision.zoo.cards import ZOO_WEIGHTS, find_card

    card = find_card(args.model_path)
    if card is None:
        whole = [name for name, found in ZOO_WEIGHTS.items() if not found.package]
        raise InputError(
            "predict: --model_path without --config: expected the name of a whole model in the "
            f"zoo, got {shorten(args.model_path)}. {suggest_nearest(args.model_path, whole)} Pass "
            "--config as well, or --model_dir instead."
        )
    if args.bits is None:
        return {"folder": card.name}
    return {"folder": card.name, "layered": card.folder, "bits": args.bits}
