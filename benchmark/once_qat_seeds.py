"""Once-QAT in integers against float training: scores of exported folders, over seeds.

    python -m ppvision data digit-scenes --output data/digit_scenes
    python benchmark/once_qat_seeds.py --work_dir output/once_qat_seeds

From the zoo's weights of digit scenes, the same number of steps of the same config: in float, and
with once-QAT at 8, 4 and 2 bits with inputs of layers at 8 bits
(configs/quantization/once_qat_8_4_2_integers.yml), for each seed. Every model is exported for one
picture of 112 x 112: float as it is and, without further training, in 8-bit integers; once-QAT at
each width in integers. Paddle Inference scores each folder on the whole val split.

Rows of benchmark/results/once_qat_seeds.csv, each written when it is measured; those that are there
stay. The rows at the end have the mean and the standard deviation over the seeds (of the sample).
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from benchmark.runs import Rows, add_rows, claim_run, mean_and_spread, read_rows
from ppvision.environment import machine

RESULTS = Path(__file__).with_name("results") / "once_qat_seeds.csv"
FIELDS = ["training", "bits", "arithmetic", "seed", "miou", "steps", "machine"]
RATE = 5e-5  # of both; few bits need more than the config's
CONFIG = ROOT / "configs" / "segmentation" / "segformer_pale_nano_digit_scenes.yml"
SLIM = ROOT / "configs" / "quantization" / "once_qat_8_4_2_integers.yml"
WEIGHTS = "segformer_pale_nano.digit_scenes"
WIDTHS = (8, 4, 2)
SIDE = 112  # pixels of a scene


def run_command(*words: object) -> str:
    """What a verb prints.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    command = [sys.executable, "-W", "ignore", "-m", "ppvision", *map(str, words)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    return done.stdout


def train(folder: Path, seed: int, steps: int, data: list[str], *, once: bool) -> Path:
    """The weights after the last step."""
    run_command(
        "train", "-c", CONFIG, "--model_path", WEIGHTS, "--save_dir", folder, "--seed", seed,
        "--learning_rate", RATE,
        "--iters", steps, "--save_interval", steps, "--resume", "auto",
        *(["--slim_config", SLIM] if once else []), "--opts", *data,
    )  # fmt: skip
    return folder / "checkpoints" / f"step_{steps}" / "model.safetensors"


def export_all(
    folder: Path, weights: Path, data: list[str], *, once: bool
) -> Iterator[tuple[int, str, Path]]:
    """Width, arithmetic and folder of each export."""
    size = ("--input_shape", 1, 3, SIDE, SIDE)
    if once:
        layers, target = folder / "model.layered", folder / "inference"
        run_command(
            "pack", "-c", folder / "config.yml", "--model_path", weights, "--output", layers
        )
        what = ("--model_path", layers, "--bits", *WIDTHS, "--int8", "--skip_eval")
        run_command("export", "-c", CONFIG, *what, "--save_dir", target, *size, "--opts", *data)
        yield from ((bits, "int8", target / f"w{bits}") for bits in WIDTHS)
        return
    for bits, arithmetic, what in ((32, "float32", ()), (8, "int8", ("--int8", "--skip_eval"))):
        target = folder / f"inference_{arithmetic}"
        what = ("--model_path", weights, *what)
        run_command("export", "-c", CONFIG, *what, "--save_dir", target, *size, "--opts", *data)
        yield bits, arithmetic, target


def measure(work: Path, seed: int, steps: int, data: list[str], *, once: bool) -> Rows:
    """A row of each export of one training."""
    kind = "once_qat" if once else "float"
    folder = work / f"{kind}_{seed}"
    weights = train(folder, seed, steps, data, once=once)
    rows = []
    for bits, arithmetic, exported in export_all(folder, weights, data, once=once):
        words = ("eval", "-c", CONFIG, "--model_dir", exported, "--precision", arithmetic)
        said = json.loads(run_command(*words, "--json", "--opts", *data))
        row = {"training": kind, "bits": bits, "arithmetic": arithmetic, "seed": seed}
        (found,) = said["results"]
        row |= {"miou": f"{found['scores']['mIoU']:.4f}", "steps": steps, "machine": machine()}
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--work_dir", type=Path, required=True)
    parser.add_argument("--data_root", type=Path, default=Path("data/digit_scenes"))
    parser.add_argument("--iters", type=int, default=100, help="steps of each training (100)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    root = args.data_root.resolve()
    data = [f"{part}_dataset.dataset_root={root}" for part in ("train", "val")]
    data += [f"{part}_dataset.{part}_path={root}/{part}.txt" for part in ("train", "val")]
    for seed in args.seeds:
        for once in (False, True):
            kind = "once_qat" if once else "float"
            with claim_run(args.work_dir / f"{kind}_{seed}.lock") as ours:
                done = {(row["training"], row["seed"]) for row in read_rows(args.results)}
                if not ours or (kind, str(seed)) in done:
                    continue
                rows = measure(args.work_dir, seed, args.iters, data, once=once)
                add_rows(args.results, rows, FIELDS, _order, _summarise)
                for row in rows:
                    print(row, flush=True)


def _order(row: dict) -> tuple:
    return row["training"], -int(row["bits"]), int(row["seed"])


def _summarise(rows: Rows) -> Rows:
    return mean_and_spread(rows, ("training", "bits", "arithmetic"), ("miou",))


if __name__ == "__main__":
    main()
