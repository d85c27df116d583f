"""Detectors over pale_nano, trained to the end on two cores.

    bccd        PP-YOLOE, blood cells: configs/detection/ppyoloe_pale_nano_bccd.yml, from scratch
    bccd_resnet the same over PaddleDetection's ResNet18-vd: ppyoloe_resnet18_bccd.yml, from scratch
    bccd_ptq    the first, its averaged weights quantised without any training
    bccd_once   the first, trained on at 8, 4 and 2 bits together, from its averaged weights
    scenes      Mask R-CNN on digit-scenes: mask_rcnn_pale_nano_digit_scenes.yml, the backbone from
                the zoo's weights

    python -m ppvision data bccd --source BCCD --output data/bccd
    python -m ppvision data digit-scenes --output data/digit_scenes
    python benchmark/detection.py --data_root data

writes benchmark/results/detection_runs.csv: a row per width as each run ends. Scores are those of
the averaged weights after the last step, on the val split; no step is chosen by it. `cpu_minutes`
is the processor's time of the training. Stopped, a run goes on where it was.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ppvision.engine.checkpoint import list_checkpoints
from ppvision.engine.run_folder import RunFolder
from ppvision.environment import machine
from ppvision.tables import format_records
from ppvision.tasks import open_job
from ppvision.tasks.detection.job import Detection
from ppvision.tasks.training import run_training, train_options

sys.path.append(str(Path(__file__).resolve().parents[1]))
from benchmark.runs import ProcessorClock, add_rows, claim_run, read_rows, spent

RESULTS = Path(__file__).with_name("results") / "detection_runs.csv"
CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "detection"
SCORES = ("bbox_AP", "bbox_AP50", "bbox_AP75", "mask_AP", "mask_AP50", "mask_AP75")
FIELDS = ("case", "bits", "seed", *SCORES, "parameters", "epochs", "cpu_minutes", "machine")
WIDTHS = (8, 4, 2)
# Our choice: a fifth of the float training's length, a fifth of its rate.
ONCE = ("epoch=8", "LearningRate.base_lr=0.0002", "LearningRate.schedulers.0.max_epochs=8")
ONCE += ("PPYOLOEHead.static_assigner_epoch=0",)  # it knows boxes already
EMA_DECAY = 0.998  # of the averaged weights: a few epochs


@dataclass(frozen=True)
class Case:
    """One model.

    Attributes:
        config: under configs/detection.
        data: folder under --data_root.
        options: `--opts` of the config.
        bits: widths that are scored; none for a model in float.
        source: the case whose weights it starts from, or is.
        trained: whether it is trained at all.
    """

    config: str
    data: str
    options: tuple[str, ...] = ()
    bits: tuple[int, ...] = ()
    source: str | None = None
    trained: bool = True


CASES = {
    "bccd": Case("ppyoloe_pale_nano_bccd.yml", "bccd"),
    "bccd_ptq": Case(
        "ppyoloe_pale_nano_bccd.yml", "bccd", bits=WIDTHS, source="bccd", trained=False
    ),
    "bccd_once": Case(
        "ppyoloe_pale_nano_bccd.yml", "bccd", options=ONCE, bits=WIDTHS, source="bccd"
    ),
    "bccd_resnet": Case("ppyoloe_resnet18_bccd.yml", "bccd"),
    "scenes": Case("mask_rcnn_pale_nano_digit_scenes.yml", "digit_scenes"),
}


def open_case(name: str, data_root: Path, options: Sequence[str] = ()) -> Detection:
    """The job of a case."""
    case = CASES[name]
    paths = [f"{p}.dataset_dir={data_root / case.data}" for p in ("TrainDataset", "EvalDataset")]
    slim = [f"slim_config={{bits: {list(case.bits)}}}"] if case.bits else []
    return open_job(CONFIGS / case.config, [*paths, *case.options, *slim, *options])


def find_averaged(folder: Path) -> Path:
    """The averaged weights of a run's last checkpoint."""
    return list_checkpoints(RunFolder(folder).checkpoints)[-1] / "ema.safetensors"


def run(name: str, data_root: Path, work_dir: Path, options: Sequence[str]) -> list[dict]:
    """Train to the end, going on where it was, and score; returns a row per width."""
    case, job = CASES[name], open_case(name, data_root, options)
    weights = work_dir / case.source if case.source else None
    if case.trained:
        folder = RunFolder(work_dir / name)
        how = train_options(
            job,
            resume="auto",
            use_ema=True,
            ema_decay=EMA_DECAY,
            log_iters=25,
            save_interval=min(100, job.iters),
            keep_checkpoint_max=1,
        )
        run_training(
            job,
            folder,
            how,
            do_eval=False,
            use_vdl=False,
            model_path=None if weights is None else find_averaged(weights),
            callbacks=[ProcessorClock(folder.root)],
        )
        weights = folder.root
        job = open_case(name, data_root, options)
    parameters = sum(p.size for p in job.float_model.parameters())
    rows = []
    for bits, model in job.models(find_averaged(weights)):
        found = {tag.split("/")[1]: value for tag, value in job.evaluate(model).by_tag().items()}
        rows.append(
            {
                "case": name,
                "bits": bits,
                "seed": 0,
                **{score: f"{found[score]:.4f}" for score in SCORES if score in found},
                "parameters": parameters,
                "epochs": job.content["epoch"] if case.trained else 0,
                "cpu_minutes": f"{spent(weights) / 60:.2f}" if case.trained else "",
                "machine": machine(),
            }
        )
    return rows


def order(row: dict) -> tuple:
    return list(CASES).index(row["case"]), -int(row["bits"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_root", type=Path, required=True, help="made by `ppvision data`")
    parser.add_argument("--work_dir", type=Path, default=Path("output/detection"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--opts", nargs="+", default=[], help="of every config")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger().setLevel(logging.INFO)  # some of Paddle's imports set it first
    for name in args.cases:
        with claim_run(args.work_dir / f"{name}.lock") as ours:
            done = {row["case"] for row in read_rows(args.results)}
            if not ours or name in done:
                continue
            logging.info(f"run: {name}")
            rows = run(name, args.data_root.resolve(), args.work_dir, args.opts)
            add_rows(args.results, rows, FIELDS, order, lambda rows: [])
    print(format_records(read_rows(args.results)))


if __name__ == "__main__":
    main()
