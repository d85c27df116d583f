"""SDN against no SDN, a plain convolution and a central difference, on nuclei and street scenes.

One network, one recipe; only what stands between the backbone and the head differs:

    baseline            nothing
    plain_conv          SDN with a plain 3 x 3 convolution, without guidance, as many parameters
    central_difference  SDN without guidance (similarity `none`)
    charbonnier, gaussian, perona_malik, cosine, increasing     SDN with this similarity

on every level of the backbone; with `_finest`, on the finest one alone; with `_light`, on the two
finest, 32 channels wide. The head is PaddleSeg's
SegFormer. Backbones: pale_nano, which starts from the zoo's `segformer_pale_nano.digit_scenes`, and
ResNet18_vd, which starts from nothing.

    python -m ppvision data dsb2018 --border 2 --source dsb2018 --output data/dsb2018_border
    python -m ppvision data camvid --source camvid --output data/camvid
    python benchmark/sdn_boundary.py --data_root data

writes benchmark/results/sdn_runs.csv, a row per run as it ends, then means and standard deviations.
`--stage 1` runs every variant once, on nuclei over pale_nano; `--stage 2` some of them on both sets
with three seeds, and baseline and SDN over ResNet18_vd; `--full` everything. Stopped, it goes
on where it was. Started twice (with `OMP_NUM_THREADS=1`, a core each), the two processes share the
runs out. Scores are those of the last step, never the best of several, of the exported model on
whole pictures. `--costs` writes benchmark/results/sdn_costs.csv: parameters, multiply-adds, time.
"""

import argparse
import itertools
import logging
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import paddle
import yaml
from paddle import Tensor, nn
from paddleseg.cvlibs import manager

from ppvision.deploy import Predictor
from ppvision.engine.run_folder import RunFolder
from ppvision.environment import machine
from ppvision.files import write_text
from ppvision.nn import PaleAttention, SemanticDifferenceConv2D, SemanticDiffusion
from ppvision.plugins.paddleseg import SemanticDiffusionBackbone
from ppvision.tasks import open_job
from ppvision.tasks.segmentation.job import Segmentation
from ppvision.tasks.segmentation.scores import BOUNDARY_SCORES
from ppvision.tasks.training import run_training, train_options

sys.path.append(str(Path(__file__).resolve().parents[1]))
from benchmark.runs import add_row, claim_run, mean_and_spread, read_rows, write_rows

RESULTS = Path(__file__).with_name("results")
STEPS, BATCH, CROP, RATE = 600, 4, 224, 1e-3
SIMILARITIES = ("charbonnier", "gaussian", "perona_malik", "cosine", "increasing")
FINEST = {"levels": [0]}
# What stands around the backbone: the options of `SemanticDiffusionBackbone`, `plain` apart.
VARIANTS: dict[str, dict | None] = {
    "baseline": None,
    "plain_conv": {"plain": True},
    "central_difference": {"similarity": "none"},
    **{name: {"similarity": name} for name in SIMILARITIES},
    "plain_conv_finest": {"plain": True, **FINEST},
    "central_difference_finest": {"similarity": "none", **FINEST},
    "charbonnier_finest": {"similarity": "charbonnier", **FINEST},
    "central_difference_light": {"similarity": "none", "levels": [0, 1], "width": 32},
}
BEST = "gaussian"  # similarity of stage 1, by Boundary IoU
SEEDS = (0, 1, 2)
DATA = {"dsb2018": ("dsb2018_border", 3), "camvid": ("camvid", 11)}  # folder, classes
# Without a weight nothing learns the border between touching nuclei in so few steps.
LOSS = {"dsb2018": {"weight": [1.0, 1.0, 5.0]}, "camvid": {}}
BACKBONES = {
    "pale_nano": {"type": "pale_nano", "pretrained": "segformer_pale_nano.digit_scenes"},
    "resnet18_vd": {"type": "ResNet18_vd", "output_stride": 32},
}
SCORES = ("mIoU", *BOUNDARY_SCORES)
FIELDS = ("data", "backbone", "variant", "seed", *SCORES, "steps", "machine")


@dataclass(frozen=True)
class Case:
    """One run."""

    data: str
    backbone: str
    variant: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.data}_{self.backbone}_{self.variant}_{self.seed}"


# -- the control: a plain convolution in place of the semantic difference -------------------------


class PlainConv(nn.Conv2D):
    """A 3 x 3 convolution with the face of `SemanticDifferenceConv2D`; the guidance is not used."""

    def forward(self, u: Tensor, v: Tensor | None = None) -> Tensor:
        return super().forward(u)


def trained_size(layer: nn.Layer) -> int:
    return sum(p.size for p in layer.parameters() if not p.stop_gradient)


def without_difference(diffusion: SemanticDiffusion) -> None:
    """Put a plain convolution in, widened to the parameters of all that it replaces."""
    width, channels = diffusion.difference.in_channels, diffusion.fuse.weight.shape[0]
    replaced = (diffusion.difference, diffusion.guide, diffusion.norm, diffusion.fuse)
    budget = sum(trained_size(layer) for layer in replaced) - channels * (channels + 1)
    wide = round(budget / (9 * width + 2 + channels))  # convolution, BatchNorm, fusion
    zero = nn.initializer.Constant(0.0)
    diffusion.guide = None
    diffusion.difference = PlainConv(width, wide, 3, padding=1, bias_attr=False)
    diffusion.norm = nn.BatchNorm2D(wide)
    diffusion.fuse = nn.Conv2D(channels + wide, channels, 1)
    zero(diffusion.fuse.weight)
    zero(diffusion.fuse.bias)


@manager.BACKBONES.add_component
class PlainConvBackbone(SemanticDiffusionBackbone):
    """`SemanticDiffusionBackbone` with plain convolutions."""

    def __init__(self, backbone: nn.Layer, levels: list[int] | None = None) -> None:
        super().__init__(backbone, levels, BEST)  # as large as SDN with it
        for diffusion in self.diffusion.diffusions:
            without_difference(diffusion)


# -- one run ---------------------------------------------------------------------------------------


def config(case: Case, data_root: Path, steps: int) -> dict:
    """What PaddleSeg is told."""
    folder, classes = DATA[case.data]
    backbone = dict(BACKBONES[case.backbone])
    options = VARIANTS[case.variant]
    if options is not None:
        kind = "PlainConvBackbone" if options.get("plain") else "SemanticDiffusionBackbone"
        rest = {key: value for key, value in options.items() if key != "plain"}
        backbone = {"type": kind, "backbone": backbone, **rest}
    normalize = {"type": "Normalize", "mean": [0.5] * 3, "std": [0.5] * 3}

    def dataset(mode: str, transforms: list[dict]) -> dict:
        root = data_root / folder
        return {
            "type": "Dataset",
            "mode": mode,
            "dataset_root": str(root),
            f"{mode}_path": str(root / f"{mode}.txt"),
            "num_classes": classes,
            "transforms": [*transforms, normalize],
        }

    augmentation = [
        {
            "type": "ResizeStepScaling",
            "min_scale_factor": 0.75,
            "max_scale_factor": 1.5,
            "scale_step_size": 0,
        },
        {"type": "RandomPaddingCrop", "crop_size": [CROP, CROP]},
        {"type": "RandomHorizontalFlip"},
        {
            "type": "RandomDistort",
            "brightness_range": 0.3,
            "contrast_range": 0.3,
            "saturation_range": 0.3,
        },
    ]
    return {
        "task": "segmentation",
        "batch_size": BATCH,
        "iters": steps,
        "seed": case.seed,
        "train_dataset": dataset("train", augmentation),
        "val_dataset": dataset("val", []),
        "model": {
            "type": "SegFormer",
            "num_classes": classes,
            "embedding_dim": 128,
            "backbone": backbone,
        },
        "optimizer": {
            "type": "AdamW",
            "weight_decay": 0.01,
            "grad_clip_cfg": {"name": "ClipGradByGlobalNorm", "clip_norm": 1.0},
        },
        "lr_scheduler": {
            "type": "PolynomialDecay",
            "learning_rate": RATE,
            "end_lr": 0.0,
            "power": 0.9,
            "warmup_iters": max(1, steps // 10),
            "warmup_start_lr": 1e-6,
        },
        "loss": {"types": [{"type": "CrossEntropyLoss", **LOSS[case.data]}], "coef": [1]},
    }


def open_case(case: Case, data_root: Path, work_dir: Path, steps: int) -> Segmentation:
    """The job, from a config that stays beside its run."""
    work_dir.mkdir(parents=True, exist_ok=True)
    path = work_dir / f"{case.name}.yml"
    write_text(path, yaml.safe_dump(config(case, data_root, steps), sort_keys=False))
    return open_job(path)


def run(case: Case, data_root: Path, work_dir: Path, steps: int) -> dict[str, object]:
    """Train to the end, going on where it was, export and score; returns the row."""
    job = open_case(case, data_root, work_dir, steps)
    folder = RunFolder(work_dir / case.name)
    if folder.config.exists():
        begun = yaml.safe_load(folder.config.read_text(encoding="utf-8"))["iters"]
        if begun != steps:
            raise SystemExit(
                f"{folder.root}: expected a run of --steps {steps}, found one of {begun}. Name "
                "another --work_dir."
            )
    options = train_options(
        job, resume="auto", log_iters=50, save_interval=100, keep_checkpoint_max=1
    )
    run_training(job, folder, options, do_eval=False, use_vdl=False)
    exported = export(job, folder.root / "inference", [1, 3, None, None])
    scores = job.evaluate_exported(exported)
    return {
        **asdict(case),
        "mIoU": f"{scores.miou:.4f}",
        **{name: f"{value:.4f}" for name, value in scores.boundary.items()},
        "steps": steps,
        "machine": machine(),
    }


def export(job: Segmentation, folder: Path, shape: list[int | None]) -> Path:
    return job.export(
        job.model, folder, input_shape=shape, output_op="argmax", model_format="paddle"
    )


# -- the matrix ------------------------------------------------------------------------------------


def stage(number: int) -> list[Case]:
    """The runs of a stage, in order."""
    if number == 1:
        return [Case("dsb2018", "pale_nano", variant, 0) for variant in VARIANTS]
    matrix = [
        Case(data, "pale_nano", variant, seed)
        for seed in SEEDS
        for data in DATA
        for variant in ("baseline", "plain_conv", "central_difference", BEST)
    ]
    return matrix + [
        Case(data, "resnet18_vd", variant, seed)
        for seed in SEEDS
        for data in DATA
        for variant in ("baseline", BEST)
    ]


def full() -> list[Case]:
    """Every variant on every set over every backbone, three times."""
    return [Case(*case) for case in itertools.product(DATA, BACKBONES, VARIANTS, SEEDS)]


def order(row: dict) -> tuple:
    return (
        list(DATA).index(row["data"]),
        list(BACKBONES).index(row["backbone"]),
        list(VARIANTS).index(row["variant"]),
        int(row["seed"]),
    )


def summary(rows: list[dict]) -> list[dict]:
    """Mean and standard deviation (of the sample) over the seeds of each variant."""
    return mean_and_spread(rows, ("data", "backbone", "variant"), SCORES)


# -- what it costs ---------------------------------------------------------------------------------


def multiply_adds(model: nn.Layer, side: int) -> int:
    """Of a picture `side` x `side`: convolutions, linear layers, the two products of attention."""
    counted = []

    def count(layer: nn.Layer, inputs: tuple, output: Tensor) -> None:
        if isinstance(layer, nn.Conv2D):
            counted.append(layer.weight.size * output.shape[-1] * output.shape[-2])
        elif isinstance(layer, SemanticDifferenceConv2D):
            # The centre has no difference; without similarity all is exported as one convolution.
            taps = layer.weight.size * (9 if layer.similarity == "none" else 8) // 9
            counted.append(taps * output.shape[-1] * output.shape[-2])
        elif isinstance(layer, nn.Linear):
            counted.append(layer.weight.size * output.size // output.shape[-1])
        elif isinstance(layer, PaleAttention):
            rows, columns = layer.pale_size
            height, width = (
                -(-n // s) * s for n, s in zip(output.shape[2:], (rows, columns), strict=True)
            )
            counted.append(output.shape[1] * height * width * (rows * width + columns * height))

    hooks = [layer.register_forward_post_hook(count) for layer in model.sublayers()]
    model.eval()
    with paddle.no_grad():
        model(paddle.zeros([1, 3, side, side]))
    for hook in hooks:
        hook.remove()
    return sum(counted)


def costs(backbone: str, data_root: Path, work_dir: Path, repeats: int) -> list[dict]:
    """Parameters, multiply-adds and latency of each variant over a backbone, for three classes."""
    folders, sizes = {}, []
    for variant in VARIANTS:
        case = Case("dsb2018", backbone, variant, 0)
        job = open_case(case, data_root, work_dir, STEPS)
        paddle.seed(0)
        folders[variant] = export(job, work_dir / f"{case.name}_cost", [1, 3, CROP, CROP])
        sizes.append({"backbone": backbone, "variant": variant, **size_of(job.model, CROP)})
    times = time_in_turn(folders, CROP, repeats)
    return [{**row, **times[row["variant"]], "machine": machine()} for row in sizes]


def size_of(model: nn.Layer, side: int) -> dict[str, int]:
    """Trained parameters, and multiply-adds of a picture `side` x `side`."""
    return {"parameters": trained_size(model), "multiply_adds": multiply_adds(model, side)}


def time_in_turn(folders: Mapping[str, Path], side: int, repeats: int) -> dict[str, dict]:
    """Time exported models of one picture `side` x `side`, in turn, on one and on two threads.

    Returns:
        For each name in `folders` the columns `engine`, and for both numbers of threads `ms` and
        `ratio`, the median ratio to the first of them.
    """
    first, *_ = folders
    columns: dict[str, dict] = {name: {} for name in folders}
    for threads in (1, 2):
        predictors = {v: Predictor(folder, threads=threads) for v, folder in folders.items()}
        x = np.random.default_rng(0).normal(size=[1, 3, side, side]).astype(np.float32)
        times: dict[str, list[float]] = {name: [] for name in predictors}
        for number in range(5 + repeats):  # in turn, so that what else happens meets all alike
            for name, predictor in predictors.items():
                start = time.perf_counter()
                predictor.run(x)
                if number >= 5:
                    times[name].append(1e3 * (time.perf_counter() - start))
        for name, row in columns.items():
            row["engine"] = predictors[name].engine
            mine, base = np.array(times[name]), np.array(times[first])
            row[f"ms_{threads}_threads"] = f"{np.median(mine):.2f}"
            row[f"ratio_{threads}_threads"] = f"{np.median(mine / base):.3f}"
    return columns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_root", type=Path, required=True, help="made by `ppvision data`")
    parser.add_argument(
        "--work_dir", type=Path, default=Path("output/sdn_boundary"), help="for the runs"
    )
    parser.add_argument(
        "--results", type=Path, default=RESULTS / "sdn_runs.csv", help="the table, a CSV file"
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="of each run (600)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--stage", type=int, choices=(1, 2), help="both, if not given")
    what.add_argument("--full", action="store_true", help="every variant everywhere")
    what.add_argument("--costs", action="store_true", help="no training: what each variant costs")
    parser.add_argument("--repeats", type=int, default=60, help="timed runs of --costs")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger().setLevel(logging.INFO)  # some of Paddle's imports set it first
    if args.results.is_dir():
        parser.error(f"--results: expected a CSV file, got the folder {args.results}.")
    if args.costs:
        rows = [
            row
            for backbone in BACKBONES
            for row in costs(backbone, args.data_root, args.work_dir, args.repeats)
        ]
        write_rows(RESULTS / "sdn_costs.csv", rows)
        print((RESULTS / "sdn_costs.csv").read_text(encoding="utf-8"))
        return
    others = {row["steps"] for row in read_rows(args.results)} - {str(args.steps)}
    if others:
        parser.error(
            f"{args.results} has runs of {', '.join(sorted(others))} steps; expected that as "
            "--steps, or other --results and --work_dir."
        )
    cases = (
        full()
        if args.full
        else [c for n in ([args.stage] if args.stage else (1, 2)) for c in stage(n)]
    )
    for case in cases:
        with claim_run(args.work_dir / f"{case.name}.lock") as ours:
            done = {
                tuple(row[k] for k in ("data", "backbone", "variant", "seed"))
                for row in read_rows(args.results)
            }
            if not ours or (case.data, case.backbone, case.variant, str(case.seed)) in done:
                continue
            logging.info(f"run: {case.name}")
            row = run(case, args.data_root, args.work_dir, args.steps)
            add_row(args.results, row, FIELDS, order, summary)
    print(args.results.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
