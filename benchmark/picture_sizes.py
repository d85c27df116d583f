"""What size of picture and of pale suits Tiny-ImageNet-100: short trainings of the same length.

    OMP_NUM_THREADS=1 python benchmark/picture_sizes.py --work_dir ~/ppvision-runs/sizes

(docs/training.md says where data/tiny-imagenet-100 comes from.) `pale_nano` from scratch by the
recipe of configs/classification/pale_nano_tiny_imagenet_100.yml, without its teacher and its
warm-up, and with one size from the first step to the last: 200 steps of 64 pictures of 64 pixels,
or enlarged to 112.
Pales have 4 or 7 rows and columns. Writes results/picture_sizes.csv, a row per run as it ends:
top-1 of the last step on all 5,000 pictures for validation, and the processor's time of the
training. Stopped, it goes on where it was. A run sees a quarter of the pictures:
it says what learns faster at the start, not what is better in the end.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from ppvision.environment import prefer_fast_mkl

prefer_fast_mkl()  # before Paddle starts

import yaml

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmark.runs import ProcessorClock, add_row, claim_run, read_rows, spent
from ppvision.engine.run_folder import RunFolder
from ppvision.environment import machine
from ppvision.files import write_text
from ppvision.tasks import open_job
from ppvision.tasks.training import run_training, train_options

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmark" / "results" / "picture_sizes.csv"
CONFIG = ROOT / "configs" / "classification" / "pale_nano_tiny_imagenet_100.yml"
STEPS, BATCH = 200, 64
FIELDS = ("picture", "pale_size", "steps", "top1", "loss", "cpu_minutes", "machine")


@dataclass(frozen=True)
class Case:
    """A run: the side of its pictures, and the rows and columns of a pale."""

    picture: int
    pale_size: int

    @property
    def name(self) -> str:
        return f"{self.picture}_{self.pale_size}"


CASES = [Case(picture, pale_size) for picture in (64, 112) for pale_size in (4, 7)]


def content_of(case: Case) -> dict:
    """The config of a run."""
    content = open_job(CONFIG).content
    for name in ("sizes", "teacher", "epochs"):
        del content[name]
    content["model"]["pale_size"] = case.pale_size
    sizes = {
        "RandomResizedCrop": {"size": case.picture},
        "ResizeByShort": {"short_size": case.picture},
        "CenterCrop": {"target_size": [case.picture, case.picture]},
    }
    for split in ("train_dataset", "val_dataset"):
        for transform in content[split]["transforms"]:
            transform.update(sizes.get(transform["type"], {}))
    content["lr_scheduler"]["warmup_epochs"] = 0  # the whole run is less than one
    return {**content, "batch_size": BATCH, "iters": STEPS}


def run(case: Case, work_dir: Path) -> dict:
    """Train to the end, going on where it was; returns the row."""
    config = work_dir / f"{case.name}.yml"
    write_text(config, yaml.safe_dump(content_of(case), sort_keys=False))
    job = open_job(config)
    folder = RunFolder(work_dir / case.name)
    options = train_options(
        job, resume="auto", log_iters=25, save_interval=100, keep_checkpoint_max=1
    )
    clock = ProcessorClock(folder.root)
    run_training(
        job, folder, options, do_eval=False, use_vdl=False, skip_check=True, callbacks=[clock]
    )
    scores = job.evaluate(job.model)
    return {
        "picture": case.picture,
        "pale_size": case.pale_size,
        "steps": STEPS,
        "top1": f"{scores.top1:.4f}",
        "loss": f"{scores.loss:.4f}",
        "cpu_minutes": f"{spent(folder.root) / 60:.2f}",
        "machine": machine(),
    }


def key_of(row: dict) -> tuple[int, int]:
    return int(row["picture"]), int(row["pale_size"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work_dir", type=Path, required=True, help="of runs; outside of git")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    for case in CASES:
        done = {key_of(row) for row in read_rows(args.results)}
        if (case.picture, case.pale_size) in done:
            continue
        with claim_run(args.work_dir / f"{case.name}.lock") as mine:
            if mine:
                row = run(case, args.work_dir)
                add_row(args.results, row, FIELDS, key_of, lambda rows: [])
                print(row, flush=True)


if __name__ == "__main__":
    main()
