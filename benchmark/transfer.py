"""What weights to start from, and what form of SDN, are worth on nuclei and street fronts.

    python -m ppvision data dsb2018 --border 2 --source stage1_train --output data/nuclei
    ln -s "$PPVISION_DATA/facade" data/facade
    OMP_NUM_THREADS=1 python benchmark/transfer.py --work_dir ~/ppvision-runs/transfer
    OMP_NUM_THREADS=1 python benchmark/transfer.py --work_dir ~/ppvision-runs/forms --forms
    python benchmark/transfer.py --work_dir ~/ppvision-runs/forms --costs
    python benchmark/plots/transfer.py

The first command trains `pale_nano` under SegFormer's head from scratch and from
`pale_nano.tiny_imagenet_100`, three seeds each; the second compares forms of SDN, from these
weights: each form once, then two more seeds of the best three. All runs have one recipe, that of
configs/segmentation/segformer_pale_nano_sdn_*.yml with crops of 128 pixels and the steps below:
1,000 of 8 crops from scratch and from the weights, 2,000 of 4 crops for the forms, which is as much
work. The classes weigh in the loss as they do there.

The third writes results/sdn_form_costs.csv: what each form costs, exported for a picture of 224 x
224. The others write results/transfer.csv and results/sdn_forms.csv, a row per run as it ends, then
means and standard deviations; and results/transfer_curves.csv, the scores on the way. Scores are
those of the last step, on the whole val split; on the way a quarter of it is scored. Stopped, the
script goes on where it was; started twice, the two processes share the runs out.
"""

import argparse
import csv
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

from ppvision.environment import prefer_fast_mkl

prefer_fast_mkl()  # before Paddle starts

import paddle
import yaml

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmark.runs import add_row, add_rows, claim_run, mean_and_spread, read_rows, write_rows
from benchmark.sdn_boundary import export, size_of, time_in_turn
from benchmark.sdn_forms import COMPARED, FORMS
from ppvision.engine.run_folder import RunFolder
from ppvision.environment import machine
from ppvision.files import write_text
from ppvision.tasks import open_job
from ppvision.tasks.training import run_training, train_options

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmark" / "results"
CONFIGS = ROOT / "configs" / "segmentation"
CROP, RATE = 128, 1e-3
POINTS = 5  # of a learning curve
SEEDS = (0, 1, 2)
SETS = ("nuclei", "facade")
WEIGHTS = "pale_nano.tiny_imagenet_100"
INITS = {"scratch": None, "pretrained": WEIGHTS}
AUXILIARY = 0.4  # factor of the loss of a guidance's own head

BEST = 3  # forms that get all seeds
SIDE, REPEATS = 224, 60  # of pictures, and timed runs, for `--costs`


@dataclass(frozen=True)
class Length:
    """Of a run: steps of the optimiser, and crops per step."""

    steps: int
    batch: int


TRANSFER, LONGER = Length(1000, 8), Length(2000, 4)

SCORES = ("mIoU", "BoundaryIoU", "BoundaryF3")
FIELDS = (
    *("data", "init", "form", "seed", *SCORES),
    *("steps", "batch", "crop", "parameters", "machine"),
)
CURVE_FIELDS = ("data", "init", "form", "seed", "step", *SCORES)


@dataclass(frozen=True)
class Case:
    """A run."""

    data: str
    init: str
    form: str
    seed: int

    @property
    def name(self) -> str:
        return "_".join(self.key)

    @property
    def key(self) -> tuple[str, ...]:
        return self.data, self.init, self.form, str(self.seed)


def key_of(row: dict) -> tuple[str, ...]:
    """`Case.key` of a table's row."""
    return tuple(row[name] for name in ("data", "init", "form", "seed"))


def content_of(case: Case, length: Length, quarter: Path | None) -> dict:
    """The config of a run: that of the data set, with this recipe.

    Args:
        case: the run.
        length: of the run.
        quarter: a list of the pictures to score on the way; None scores all.
    """
    content = open_job(CONFIGS / f"segformer_pale_nano_sdn_{case.data}.yml").content
    options = FORMS[case.form]
    backbone: dict = {"type": "pale_nano", "drop_path_rate": 0.0}
    if INITS[case.init]:
        backbone["pretrained"] = INITS[case.init]
    if options is not None:
        backbone = {"type": "SemanticDiffusionBackbone", **options, "backbone": backbone}
    losses = 2 if (options or {}).get("guidance") == "classes" else 1
    for transform in content["train_dataset"]["transforms"]:
        if transform["type"] == "RandomPaddingCrop":
            transform["crop_size"] = [CROP, CROP]
    if quarter is not None:
        content["val_dataset"]["val_path"] = str(quarter)
    return {
        **content,
        "batch_size": length.batch,
        "iters": length.steps,
        "seed": case.seed,
        "model": {**content["model"], "backbone": backbone},
        "lr_scheduler": {
            **content["lr_scheduler"],
            "learning_rate": RATE,
            "warmup_iters": max(1, length.steps // 10),
        },
        "loss": {
            "types": content["loss"]["types"] * losses,
            "coef": [1, AUXILIARY][:losses],
        },
    }


def run(case: Case, work_dir: Path, length: Length) -> tuple[dict, list[dict]]:
    """Train to the end, going on where it was; returns the row and the points of its curve."""
    work_dir.mkdir(parents=True, exist_ok=True)
    root = Path(content_of(case, length, None)["val_dataset"]["dataset_root"])
    listed = (root / "val.txt").read_text(encoding="utf-8").splitlines()
    quarter = (work_dir / f"{case.data}_quarter.txt").resolve()
    write_text(quarter, "\n".join(listed[::4]) + "\n")
    configs = {}
    for name, part in (("way", quarter), ("end", None)):
        configs[name] = work_dir / f"{case.name}_{name}.yml"
        content = content_of(case, length, part)
        write_text(configs[name], yaml.safe_dump(content, sort_keys=False))
    job = open_job(configs["way"])
    folder = RunFolder(work_dir / case.name)
    options = train_options(
        job,
        resume="auto",
        log_iters=50,
        save_interval=max(1, length.steps // POINTS),
        keep_checkpoint_max=1,
    )
    run_training(job, folder, options, do_eval=True, use_vdl=False)
    scores = open_job(configs["end"]).evaluate(job.model)
    row = {
        **asdict(case),
        **_rounded({"mIoU": scores.miou, **scores.boundary}),
        "steps": length.steps,
        "batch": length.batch,
        "crop": f"{CROP}x{CROP}",
        "parameters": sum(p.size for p in job.model.parameters() if not p.stop_gradient),
        "machine": machine(),
    }
    return row, [{**asdict(case), **point} for point in read_curve(folder.root / "metrics.csv")]


def _rounded(scores: dict[str, float]) -> dict[str, str]:
    return {name: f"{float(scores[name]):.4f}" for name in SCORES}


def read_curve(path: Path) -> list[dict]:
    """The evaluations of a run's `metrics.csv`, one dictionary per step."""
    at: dict[int, dict[str, float]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            name = row["tag"].removeprefix("Evaluate/")
            if name in SCORES:
                at.setdefault(int(row["step"]), {})[name] = float(row["value"])
    return [{"step": step, **_rounded(at[step])} for step in sorted(at)]


def order(row: dict) -> tuple:
    places = (SETS.index(row["data"]), [*INITS].index(row["init"]), COMPARED.index(row["form"]))
    return (*places, int(row["seed"]), int(row.get("step", 0)))


def summary(rows: list[dict]) -> list[dict]:
    """Mean and standard deviation (of the sample) over the seeds of each kind of run."""
    return mean_and_spread(rows, ("data", "init", "form"), SCORES)


def best_forms(rows: list[dict]) -> list[str]:
    """The forms whose first seed has the highest Boundary IoU, mean over both sets."""
    first = [row for row in rows if row["seed"] == "0" and row["init"] == "pretrained"]
    found = {
        form: [float(row["BoundaryIoU"]) for row in first if row["form"] == form]
        for form in COMPARED
    }
    whole = {form: mean(values) for form, values in found.items() if len(values) == len(SETS)}
    return sorted(whole, key=whole.__getitem__, reverse=True)[:BEST]


def transfer_cases() -> list[Case]:
    return [Case(d, init, "none", seed) for seed in SEEDS for d in SETS for init in INITS]


def form_cases(rows: list[dict]) -> list[Case]:
    """Every form once; when these are done, the best with the other seeds."""
    once = [Case(data, "pretrained", form, 0) for form in COMPARED for data in SETS]
    done = {(row["data"], row["form"]) for row in rows if row["seed"] == "0"}
    if not all((case.data, case.form) in done for case in once):
        return once
    more = dict.fromkeys(["none", *best_forms(rows)])
    return [Case(d, "pretrained", form, seed) for seed in SEEDS[1:] for form in more for d in SETS]


def work(args: argparse.Namespace, results: Path) -> None:
    """Do runs of a table until none is left that nobody works on."""
    table = results / ("sdn_forms.csv" if args.forms else "transfer.csv")
    length = LONGER if args.forms else TRANSFER
    length = Length(args.steps or length.steps, length.batch)
    while True:
        rows = read_rows(table)
        done = {key_of(row) for row in rows}
        cases = form_cases(rows) if args.forms else transfer_cases()
        left = [c for c in cases if c.key not in done]
        for case in left:
            with claim_run(args.work_dir / f"{case.name}.lock") as mine:
                if not mine:
                    continue
                print(f"{case.name}: {len(left)} runs left", flush=True)
                row, curve = run(case, args.work_dir, length)
                add_row(table, row, FIELDS, order, summary)
                if not args.forms:
                    curves = results / "transfer_curves.csv"
                    add_rows(curves, curve, CURVE_FIELDS, order, lambda rows: [])
                print(row, flush=True)
                break
        else:
            return


def form_costs(work_dir: Path, repeats: int) -> list[dict]:
    """What each form costs: parameters, multiply-adds and latency, for three classes."""
    folders, sizes = {}, []
    for form in COMPARED:
        work_dir.mkdir(parents=True, exist_ok=True)
        config = work_dir / f"{form}_cost.yml"
        content = content_of(Case("nuclei", "scratch", form, 0), LONGER, None)
        write_text(config, yaml.safe_dump(content, sort_keys=False))
        job = open_job(config)
        paddle.seed(0)
        folders[form] = export(job, work_dir / f"{form}_cost", [1, 3, SIDE, SIDE])
        sizes.append({"form": form, **size_of(job.model, SIDE)})
    times = time_in_turn(folders, SIDE, repeats)
    return [{**row, **times[row["form"]], "machine": machine()} for row in sizes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work_dir", type=Path, required=True, help="of runs; outside of git")
    parser.add_argument("--forms", action="store_true", help="the forms of SDN")
    parser.add_argument("--costs", action="store_true", help="no training: what the forms cost")
    parser.add_argument("--steps", type=int, help="other than those of the recipe")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.costs:
        write_rows(args.results / "sdn_form_costs.csv", form_costs(args.work_dir, REPEATS))
        return
    work(args, args.results)


if __name__ == "__main__":
    main()
