"""`ppvision export`."""

import argparse
from typing import TYPE_CHECKING

from ppvision.cli.opening import open_job, raise_on_signals, set_device
from ppvision.cli.options import (
    EXAMPLE_CONFIG,
    Verbs,
    add_config,
    add_max_pixels,
    add_slim_config,
    add_verb,
    parse_bits,
    parse_size,
)
from ppvision.console import show
from ppvision.errors import InputError
from ppvision.tables import format_records

if TYPE_CHECKING:
    from ppvision.tasks.job import Job


def add(verbs: Verbs) -> None:
    verb = add_verb(
        verbs,
        "export",
        "write a model for Paddle Inference or ONNX Runtime",
        "Write a model for Paddle Inference or ONNX Runtime; check it with the original.",
        f"ppvision export -c {EXAMPLE_CONFIG} \\\n"
        "      --model_path segformer_pale_nano.digit_scenes --save_dir inference/mine",
    )
    add_config(verb)
    verb.add_argument("--model_path", required=True, help="weights: a file, or a name from the zoo")
    verb.add_argument(
        "--save_dir", help="folder to write (default: inference/ and the config's name)"
    )
    verb.add_argument("--format", choices=["paddle", "onnx"], default="paddle", help="file format")
    verb.add_argument(
        "--input_shape",
        type=parse_size,
        nargs=4,
        default=[None, 3, None, None],
        metavar=("N", "C", "H", "W"),
        help="shape of the input; None for a size that may change",
    )
    verb.add_argument(
        "--output_op",
        choices=["argmax", "softmax", "none"],
        help="final operator added after the logits (default: argmax); a detector's graph ends in "
        "NMS instead",
    )
    verb.add_argument(
        "--for",
        dest="reader",
        choices=["paddlex"],
        help="use the file names of PaddleX, so that PaddleX can run the folder too",
    )
    verb.add_argument(
        "--paddlex_name",
        metavar="NAME",
        help="with --for: name of the model in PaddleX (default: by the architecture, such as "
        "SegFormer-B0)",
    )
    verb.add_argument(
        "--bits",
        type=parse_bits,
        nargs="+",
        help="write one folder of packed codes per width",
    )
    verb.add_argument(
        "--int8",
        action="store_true",
        help="compute with 8-bit integers (docs/integers.md); with --bits, at each width",
    )
    verb.add_argument(
        "--calibration",
        help="with --int8: a folder or list of images (default: the config's training set)",
    )
    verb.add_argument(
        "--calibration_rule",
        choices=["error", "percentile", "maximum"],
        help="with --int8: rule that chooses the step sizes of the activations (default: error)",
    )
    verb.add_argument(
        "--keep_float",
        nargs="+",
        metavar="LAYER",
        help="with --int8: names of layers that stay in float, or a number N for the N layers that "
        "lose most accuracy",
    )
    verb.add_argument(
        "--skip_eval", action="store_true", help="with --bits or --int8: do not evaluate"
    )
    add_slim_config(verb)
    add_max_pixels(verb)
    verb.set_defaults(verb=run)


@raise_on_signals()
def run(args: argparse.Namespace) -> None:
    set_device(args.device)
    job = open_job(args)
    folder = args.save_dir or f"inference/{job.name}{'-int8' if args.int8 else ''}"
    how = {
        "input_shape": args.input_shape,
        "output_op": args.output_op,
        "model_format": args.format,
        "paddlex_name": _paddlex_name(args, job),
    }
    _check_integer_flags(args)
    if args.bits is None and args.int8:
        from ppvision.tasks.integers import export_integers

        rows = export_integers(
            job,
            args.model_path,
            folder,
            calibration=args.calibration,
            rule=args.calibration_rule,
            keep_float=[int(k) if k.isdecimal() else k for k in args.keep_float or ()],
            evaluate=not args.skip_eval,
            **how,
        )
        show(format_records(rows))
        show(f"exported model: {folder}")
        return
    if args.bits is None:
        folder = job.export(job.load_float(args.model_path), folder, **how)
        show(f"exported model: {folder}")
        return
    from ppvision.tasks.multibit.export import TABLE, export_widths

    if not args.skip_eval:
        job.check_data("val_dataset")
    rows = export_widths(
        job,
        args.model_path,
        folder,
        args.bits,
        evaluate=not args.skip_eval,
        integers=args.int8,
        **how,
    )
    show(format_records(rows))
    show(f"exported models: {folder}/w*; this table: {folder}/{TABLE}, VisualDL: {folder}/vdl")


def _paddlex_name(args: argparse.Namespace, job: "Job") -> str | None:
    if args.reader is not None:
        return args.paddlex_name or job.paddlex_name
    if args.paddlex_name is not None:
        raise InputError("--paddlex_name: applies to --for paddlex only. Pass both flags.")
    return None


def _check_integer_flags(args: argparse.Namespace) -> None:
    for flag in ("calibration", "calibration_rule", "keep_float"):
        if getattr(args, flag) is None:
            continue
        if not args.int8:
            raise InputError(f"--{flag}: applies to --int8 only. Pass both flags.")
        if args.bits is not None:
            raise InputError(
                f"--{flag} with --bits: a layered model already contains the step sizes of its "
                f"activations. Omit --{flag}. To set them, run pack --ptq --activations 8 "
                "--calibration DIR."
            )
