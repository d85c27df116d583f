"""`ppvision eval`."""

import argparse
import json

from ppvision.cli.opening import device_kind, open_job, set_device
from ppvision.cli.options import (
    EXAMPLE_CONFIG,
    Verbs,
    add_config,
    add_json,
    add_max_pixels,
    add_model,
    add_skip_check,
    add_verb,
    add_workers,
    check_precision_flag,
    parse_positive,
)
from ppvision.console import show
from ppvision.errors import InputError
from ppvision.tables import format_records


def add(verbs: Verbs) -> None:
    verb = add_verb(
        verbs,
        "eval",
        "evaluate a model",
        "Evaluate a model or an exported folder on the validation data of a config.",
        f"ppvision eval -c {EXAMPLE_CONFIG} \\\n"
        "      --model_path segformer_pale_nano.digit_scenes",
    )
    add_config(verb)
    add_model(verb)
    add_workers(verb)
    verb.add_argument(
        "--aug_eval", action="store_true", help="evaluate at several scales and flips"
    )
    verb.add_argument(
        "--scales",
        type=float,
        nargs="+",
        help="with --aug_eval: scales of the image (default: 1.0)",
    )
    verb.add_argument(
        "--flip_horizontal", action="store_true", help="with --aug_eval: flip left and right"
    )
    verb.add_argument(
        "--flip_vertical", action="store_true", help="with --aug_eval: flip up and down"
    )
    verb.add_argument("--is_slide", action="store_true", help="evaluate in sliding windows")
    verb.add_argument(
        "--crop_size",
        type=parse_positive,
        nargs=2,
        metavar=("W", "H"),
        help="with --is_slide: size of the window",
    )
    verb.add_argument(
        "--stride",
        type=parse_positive,
        nargs=2,
        metavar=("W", "H"),
        help="with --is_slide: distance between two windows",
    )
    add_max_pixels(verb)
    add_skip_check(verb)
    add_json(verb)
    verb.set_defaults(verb=run)


def run(args: argparse.Namespace) -> None:
    from ppvision.tasks.training import check_data

    set_device(args.device)
    check_precision_flag(args)
    job = open_job(args)
    check_data(job, "val_dataset", skip=args.skip_check)
    flags = {
        "aug_eval": args.aug_eval or None,
        "scales": args.scales,
        "flip_horizontal": args.flip_horizontal or None,
        "flip_vertical": args.flip_vertical or None,
        "is_slide": args.is_slide or None,
        "crop_size": args.crop_size,
        "stride": args.stride,
    }
    if args.num_workers and args.model_dir:
        raise InputError("--num_workers: an exported model reads its images itself. Omit the flag.")
    how = {flag: value for flag, value in flags.items() if value is not None}
    if not how.keys() <= set(job.evaluation_options):
        raise InputError(f"eval: --{', --'.join(how)}: segmentation only. Omit it.")
    if args.model_dir:
        if args.bits is not None:
            raise InputError("--bits: an exported folder has one width. Pass --model_path.")
        how["precision"] = args.precision
        found = {
            None: job.evaluate_exported(args.model_dir, device=device_kind(args.device), **how)
        }
    else:
        bits = None if args.bits is None else [args.bits]
        workers = args.num_workers
        models = job.models(args.model_path, bits)
        found = {k: job.evaluate(m, num_workers=workers, **how) for k, m in models}
    if args.json:
        results = [{"bits": k, **scores.as_dict(job.class_names)} for k, scores in found.items()]
        show(json.dumps({"results": results}, indent=2, allow_nan=False))
        return
    if len(found) == 1:
        show(next(iter(found.values())).table(job.class_names))
        return
    names = {k: {t.split("/")[-1]: v for t, v in s.by_tag().items()} for k, s in found.items()}
    show(format_records([{"bits": k, **scores} for k, scores in names.items()]))
