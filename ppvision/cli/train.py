"""`ppvision train`."""

import argparse
import os
import signal
from pathlib import Path

from ppvision.cli.opening import open_job, set_device
from ppvision.cli.options import (
    EXAMPLE_CONFIG,
    Verbs,
    add_config,
    add_max_pixels,
    add_skip_check,
    add_slim_config,
    add_verb,
    add_workers,
    parse_count,
    parse_positive,
    parse_rate,
)
from ppvision.console import show, tell_last
from ppvision.errors import InputError
from ppvision.precision import SPELLINGS, normalize_precision


def add(verbs: Verbs) -> None:
    verb = add_verb(
        verbs,
        "train",
        "train a model",
        "Train the model of a config.",
        f"ppvision train -c {EXAMPLE_CONFIG} \\\n"
        "      --model_path segformer_pale_nano.digit_scenes \\\n"
        "      --save_dir output/mine --do_eval",
    )
    add_config(verb)
    verb.add_argument("--save_dir", help="run folder (default: output/ and the config's name)")
    length = verb.add_mutually_exclusive_group()
    length.add_argument(
        "--iters", type=parse_positive, help="optimiser steps (default: from the config)"
    )
    length.add_argument("--epochs", type=parse_positive, help="passes over the training data")
    verb.add_argument(
        "--batch_size",
        type=parse_positive,
        help="samples per step and process (default: from the config)",
    )
    verb.add_argument(
        "--learning_rate", type=parse_rate, help="learning rate (default: from the config)"
    )
    verb.add_argument(
        "--do_eval", "--eval", action="store_true", help="evaluate during the training"
    )
    verb.add_argument("--use_vdl", action="store_true", help="write records for VisualDL")
    verb.add_argument(
        "--logger",
        action="append",
        choices=("visualdl", "tensorboard"),
        default=[],
        help="write records for this program; may be repeated (visualdl: same as --use_vdl)",
    )
    verb.add_argument(
        "--histograms", action="store_true", help="also record histograms of the weights"
    )
    verb.add_argument(
        "--use_ema", action="store_true", help="keep an exponential moving average of the weights"
    )
    verb.add_argument("-r", "--resume", help="continue from a checkpoint: auto, or its folder")
    verb.add_argument(
        "--seed", type=parse_count, help="random seed of weights and samples (default: 0)"
    )
    verb.add_argument(
        "--precision",
        type=normalize_precision,
        choices=list(SPELLINGS.values()),
        default="fp32",
        help="fp16 and bf16 need a GPU; float32, float16 and bfloat16 are accepted too",
    )
    add_workers(verb)
    verb.add_argument(
        "--save_interval",
        type=parse_positive,
        default=1000,
        help="steps between two checkpoints and evaluations",
    )
    verb.add_argument(
        "--keep_checkpoint_max",
        type=parse_positive,
        default=3,
        help="number of newest checkpoints to keep",
    )
    verb.add_argument(
        "--log_iters", type=parse_positive, default=10, help="steps between two lines of the log"
    )
    verb.add_argument("--model_path", help="initial weights: a file, or a name from the zoo")
    add_skip_check(verb)
    add_slim_config(verb)
    add_max_pixels(verb)
    verb.set_defaults(verb=run)


def run(args: argparse.Namespace) -> int | None:
    import paddle

    from ppvision.engine.reading import end_with_launcher
    from ppvision.engine.run_folder import RunFolder
    from ppvision.engine.stopping import STOP_SIGNALS, TrainingStopped
    from ppvision.tasks.training import run_training, train_options

    if args.histograms and not (args.use_vdl or args.logger):
        raise InputError(
            "--histograms: VisualDL or TensorBoard shows them. Pass --use_vdl or --logger as well."
        )
    set_device(args.device)
    if int(os.environ.get("PADDLE_TRAINERS_NUM", "1")) > 1:
        end_with_launcher()
        paddle.distributed.init_parallel_env()
    job = open_job(
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
            use_vdl=args.use_vdl or "visualdl" in args.logger,
            use_tensorboard="tensorboard" in args.logger,
            histograms=args.histograms,
            device=args.device,
            model_path=args.model_path,
            skip_check=args.skip_check,
        )
    except TrainingStopped as stop:
        for number in STOP_SIGNALS:  # Paddle's launcher repeats its signal to ending ranks
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
