"""Once-QAT against a training for each width, and against no training, on nuclei.

The network is the baseline of `benchmark/sdn_boundary.py`, pale_nano under PaddleSeg's SegFormer
head, three classes: background, nucleus, border. Every quantised model starts from the same float
weights and is trained with the same steps, batches and learning rates:

    float       full precision, what the others start from: the run of `sdn_boundary.py` itself
    dedicated   QAT at one width alone, one run a width
    once        once-QAT: one run for all widths, the equal mean of their losses (with three widths
                the sandwich rule draws the same)
    cut         the dedicated 8-bit model, its codes cut to their first k bits; no training, and
                BatchNorm's statistics stay those at 8 bits
    ptq         the float weights with the steps that serve all widths (where once-QAT starts);
                no training, and BatchNorm's statistics stay those in float

Weights only; the layer that reads the picture and the one that gives the result stay at 8 bits.

    python -m ppvision data dsb2018 --border 2 --source dsb2018 --output data/dsb2018_border
    python benchmark/layered_segmentation.py --data_root data

writes benchmark/results/layered_dsb2018.csv: a row per width as each run ends. Scores are those of
the last step on whole pictures of the val split. `cpu_minutes` is the processor's time of the whole
training, the same on each row of a run (not known of float runs, which are taken from `--work_dir`
where `sdn_boundary.py` left them there). Stopped, it goes on where it was.
"""

import argparse
import logging
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from ppvision.engine.checkpoint import list_checkpoints
from ppvision.engine.run_folder import RunFolder
from ppvision.environment import machine
from ppvision.files import write_text
from ppvision.quant import OnceQAT
from ppvision.quant.codes import FLOAT_BITS
from ppvision.quant.train.layers import set_bits
from ppvision.tasks import open_job
from ppvision.tasks.segmentation.job import Segmentation
from ppvision.tasks.training import run_training, train_options

sys.path.append(str(Path(__file__).resolve().parents[1]))
from benchmark import sdn_boundary
from benchmark.runs import add_rows, claim_run, mean_and_spread, read_rows, record_time, spent
from benchmark.sdn_boundary import SCORES

RESULTS = Path(__file__).with_name("results") / "layered_dsb2018.csv"
WIDTHS = (8, 4, 2)
METHODS = ("float", "dedicated", "once", "cut", "ptq")
UNTRAINED = ("cut", "ptq")
FIELDS = ("method", "bits", "seed", *SCORES, "steps", "cpu_minutes", "machine")
STEPS, RATE = 200, 3e-4  # our choice: a third of the float run's steps, a third of its rate


@dataclass(frozen=True)
class Case:
    """One run: a training, or models that need none.

    Attributes:
        method: of METHODS.
        bits: widths that are scored.
        seed: of samples and initial weights.
    """

    method: str
    bits: tuple[int, ...]
    seed: int

    @property
    def name(self) -> str:
        width = f"_{self.bits[0]}" if self.method == "dedicated" else ""
        return f"nuclei_{self.method}{width}_{self.seed}"

    def folder(self, work_dir: Path) -> Path:
        """Of the run; the float one is `sdn_boundary.py`'s."""
        return work_dir / (self.name if self.method != "float" else self.baseline.name)

    @property
    def baseline(self) -> sdn_boundary.Case:
        return sdn_boundary.Case("dsb2018", "pale_nano", "baseline", self.seed)

    @property
    def source(self) -> "Case":
        """The run whose weights this one starts from."""
        if self.method == "cut":
            return Case("dedicated", WIDTHS[:1], self.seed)
        return Case("float", (FLOAT_BITS,), self.seed)


def cases_of(seed: int) -> Iterator[Case]:
    """The runs of a seed, in order."""
    yield Case("float", (FLOAT_BITS,), seed)
    yield Case("ptq", WIDTHS, seed)
    yield Case("once", WIDTHS, seed)
    yield Case("dedicated", WIDTHS[:1], seed)
    yield Case("cut", WIDTHS[1:], seed)
    for bits in WIDTHS[1:]:
        yield Case("dedicated", (bits,), seed)


def weights_of(case: Case, work_dir: Path) -> Path:
    """The run's last weights."""
    checkpoints = list_checkpoints(RunFolder(case.folder(work_dir)).checkpoints)
    return checkpoints[-1] / "model.safetensors"


def open_case(case: Case, data_root: Path, work_dir: Path, steps: int) -> Segmentation:
    """The job, from a config that stays beside its run."""
    config = sdn_boundary.config(case.baseline, data_root, steps)
    if case.method != "float":
        bits = case.source.bits if case.method == "cut" else case.bits
        config["slim_config"] = {"bits": list(bits)}
        config["lr_scheduler"]["learning_rate"] = RATE
    path = work_dir / f"{case.folder(work_dir).name}.yml"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, yaml.safe_dump(config, sort_keys=False))
    return open_job(path)


def run(case: Case, data_root: Path, work_dir: Path, steps: int) -> list[dict]:
    """Train to the end, going on where it was, and score; returns a row per width."""
    job, trained = open_case(case, data_root, work_dir, steps), case.method not in UNTRAINED
    if trained:
        folder = RunFolder(case.folder(work_dir))
        options = train_options(
            job, resume="auto", log_iters=50, save_interval=100, keep_checkpoint_max=1
        )
        source = None if case.method == "float" else weights_of(case.source, work_dir)
        with record_time(folder.root, time.process_time):
            run_training(job, folder, options, do_eval=False, use_vdl=False, model_path=source)
        model = job.model
    else:
        model = job.load(weights_of(case.source, work_dir))
    minutes = "" if case.method == "float" else f"{spent(case.folder(work_dir)) / 60:.2f}"
    rows = []
    for bits in case.bits:
        if isinstance(model, OnceQAT):
            set_bits(model, bits)  # of cut, below all that `OnceQAT.set_bits` would take
        scores = job.evaluate(model)
        found = {"mIoU": scores.miou, **scores.boundary}
        rows.append(
            {
                "method": case.method,
                "bits": bits,
                "seed": case.seed,
                **{name: f"{found[name]:.4f}" for name in SCORES},
                "steps": steps if trained else 0,
                "cpu_minutes": minutes,
                "machine": machine(),
            }
        )
    return rows


def order(row: dict) -> tuple:
    return METHODS.index(row["method"]), -int(row["bits"]), int(row["seed"])


def summary(rows: list[dict]) -> list[dict]:
    """Mean and standard deviation over seeds, where there are several."""
    return mean_and_spread(rows, ("method", "bits"), SCORES)


def is_finished(case: Case, results: Path) -> bool:
    """Whether the table holds all widths of a run."""
    rows = read_rows(results)
    mine = (case.method, case.seed)
    found = {int(row["bits"]) for row in rows if (row["method"], int(row["seed"])) == mine}
    return found >= set(case.bits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_root", type=Path, required=True, help="made by `ppvision data`")
    parser.add_argument("--work_dir", type=Path, default=Path("output/sdn_boundary"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--float_steps", type=int, default=sdn_boundary.STEPS)
    parser.add_argument("--steps", type=int, default=STEPS, help="of QAT")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger().setLevel(logging.INFO)  # some of Paddle's imports set it first
    for case in (case for seed in args.seeds for case in cases_of(seed)):
        with claim_run(args.work_dir / f"{case.folder(args.work_dir).name}.lock") as ours:
            if not ours or is_finished(case, args.results):
                continue
            logging.info(f"run: {case.name}")
            steps = args.float_steps if case.method == "float" else args.steps
            rows = run(case, args.data_root, args.work_dir, steps)
            add_rows(args.results, rows, FIELDS, order, summary)
    print(args.results.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
