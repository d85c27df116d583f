"""`ppvision bench`."""

import argparse
import json
import os
from dataclasses import asdict

from ppvision.cli.opening import device_kind, open_job, set_device
from ppvision.cli.options import (
    Verbs,
    add_config,
    add_json,
    add_precision,
    add_slim_config,
    add_verb,
    parse_positive,
)
from ppvision.console import show
from ppvision.environment import count_usable_cpus
from ppvision.errors import InputError


def add(verbs: Verbs) -> None:
    verb = add_verb(
        verbs,
        "bench",
        "measure latency and memory of exported models",
        "Measure latency of exported models on the same random input, and peak memory.",
        "ppvision bench --model_dir inference/mine --size 112 112",
    )
    add_config(verb, required=False)
    verb.add_argument("--model_dir", nargs="+", required=True, help="exported folders")
    verb.add_argument("--model_path", help="with --config: also measure this model in eager mode")
    verb.add_argument(
        "--threads",
        type=parse_positive,
        default=count_usable_cpus(),
        help="CPU threads of each model",
    )
    verb.add_argument("--batch", type=parse_positive, default=1, help="images per run")
    verb.add_argument(
        "--size",
        type=parse_positive,
        nargs=2,
        metavar=("H", "W"),
        help="input size (default: that of the first export, or 224 224 if it accepts any size)",
    )
    verb.add_argument(
        "--repeats", type=parse_positive, default=30, help="number of measured runs per model"
    )
    add_slim_config(verb)
    add_json(verb)
    add_precision(verb)
    verb.set_defaults(verb=run)


def run(args: argparse.Namespace) -> None:
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # of eager mode; read when Paddle starts
    set_device(args.device)
    from ppvision.deploy.run.bench import bench_exported, format_latencies, measure_peak_memory

    eager = None
    if args.model_path:
        if args.config is None:
            raise InputError(
                "bench: --model_path: the eager model needs its config. Pass --config as well."
            )
        eager = open_job(args).load(args.model_path)
    rows = bench_exported(
        args.model_dir,
        threads=args.threads,
        batch=args.batch,
        size=tuple(args.size) if args.size else None,
        repeats=args.repeats,
        device=device_kind(args.device),
        precision=args.precision,
        eager=eager,
    )
    if args.json:
        models = [{**asdict(row), "speed_up": rows[0].median / row.median} for row in rows]
        show(json.dumps({"models": models, "peak_memory_mib": measure_peak_memory()}, indent=2))
        return
    show(format_latencies(rows))
