"""Once-QAT against a training for each width, and against no training, on CIFAR-10.

Every quantised model of a seed starts from the same float weights; every training has the same
steps, batches and learning rates:

    float           full precision, from scratch; what the others start from
    dedicated       QAT at one width alone, one run a width
    once_mean       once-QAT: one run for all widths, the equal mean of their losses
    once_sandwich   once-QAT by the sandwich rule: the highest, the lowest and one of the others
    cut             the dedicated 8-bit model, its codes cut to their first k bits; no training, and
                    BatchNorm's statistics stay those at 8 bits
    ptq             the float weights with the steps that serve all widths (where once-QAT starts);
                    no training, and BatchNorm's statistics stay those in float

Weights only; the layer that reads the picture and the one that gives the result stay at 8 bits.
Networks: resnet20 of the zoo; pale_nano for 32 x 32 pictures, with a patch embedding of stride 2
and pales of size 4. The first 1,000 pictures of each class by file name are for training, all
10,000 of the test split are scored.

    python -m ppvision data cifar10 --source cifar10_jpeg.tar.gz --output data/cifar10
    python benchmark/layered_cifar10.py --data_root data/cifar10

writes benchmark/results/layered_cifar10.csv: a row per width as each run ends, then mean and
standard deviation over seeds. Top-1 and cross entropy are those of the last step, never the best of
several. `cpu_minutes` is the processor's time of the whole training, the same on each row of a run;
`images` are those trained on. Stopped, it goes on where it was. Started twice (with
`OMP_NUM_THREADS=1`, a core each), the two processes share the runs out.
"""

import argparse
import logging
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import paddle
from paddle import nn

from ppvision import create_model
from ppvision.engine.callbacks import ProgressLog
from ppvision.engine.checkpoint import collect_arrays
from ppvision.engine.optimization import make_cosine_schedule, make_parameter_groups
from ppvision.engine.run_folder import RunFolder
from ppvision.engine.trainer import Trainer, TrainOptions
from ppvision.environment import machine
from ppvision.models.pale_transformer import PatchMerging
from ppvision.plugins.paddleslim import end_layers
from ppvision.quant import OnceQAT
from ppvision.quant.codes import FLOAT_BITS
from ppvision.quant.train.layers import set_bits
from ppvision.tasks.job import make_example_input
from ppvision.tasks.multibit.slim_config import build_once_qat
from ppvision.tasks.multibit.training import draw_widths, make_passes
from ppvision.zoo.weights import assign_weights, read_weights, save_weights

sys.path.append(str(Path(__file__).resolve().parents[1]))
from benchmark.attention_accuracy import (
    CLASSES,
    SIDE,
    Augmented,
    evaluation,
    losses,
    read_pictures,
)
from benchmark.runs import (
    ProcessorClock,
    add_rows,
    claim_run,
    mean_and_spread,
    read_rows,
    spent,
)

RESULTS = Path(__file__).with_name("results") / "layered_cifar10.csv"
WIDTHS = (8, 6, 4, 3, 2)
METHODS = ("float", "dedicated", "once_mean", "once_sandwich", "cut", "ptq")
UNTRAINED = ("cut", "ptq")
SCORES = ("top1", "loss")
FIELDS = ("network", "method", "bits", "seed", *SCORES, "steps", "images", "cpu_minutes", "machine")
BATCH, WARMUP_SHARE = 32, 0.05
PAUSE = 20.0  # seconds between two looks for a run that has become free

Data = dict[str, tuple[np.ndarray, np.ndarray]]


# -- networks --------------------------------------------------------------------------------------


def pale_nano() -> nn.Layer:
    """pale_nano whose stages see 16, 8, 4 and 2 tokens a side of a 32 x 32 picture."""
    model = create_model("pale_nano", num_classes=CLASSES, pale_size=4)
    embedding = PatchMerging(3, model.feat_channels[0], 3, 2)
    nn.initializer.KaimingNormal()(embedding[0].weight)
    model.merges[0] = embedding
    return model


@dataclass(frozen=True)
class Recipe:
    """How to train. All of it is our choice, by a few short runs.

    Attributes:
        optimizer: of Paddle.
        rate: highest learning rate.
        weight_decay: of weights.
        steps: 313 are a pass over the 10,000 pictures.
    """

    optimizer: Callable[..., paddle.optimizer.Optimizer]
    rate: float
    weight_decay: float
    steps: int


@dataclass(frozen=True)
class Network:
    """A network and its recipes.

    Attributes:
        build: with fresh weights.
        float: recipe in full precision.
        qat: recipe in QAT, alike at all widths and for all methods.
        seeds: how many.
    """

    build: Callable[[], nn.Layer]
    float: Recipe
    qat: Recipe
    seeds: tuple[int, ...]


NETWORKS = {
    "resnet20": Network(
        build=partial(create_model, "resnet20", num_classes=CLASSES),
        float=Recipe(partial(paddle.optimizer.Momentum, momentum=0.9), 0.05, 5e-4, 1560),
        # AdamW moves learned steps by shares of themselves, whatever the scale of their gradient.
        qat=Recipe(paddle.optimizer.AdamW, 1e-3, 1e-2, 468),
        seeds=(0, 1, 2),
    ),
    "pale_nano": Network(
        build=pale_nano,
        float=Recipe(paddle.optimizer.AdamW, 1e-3, 0.05, 1248),
        qat=Recipe(paddle.optimizer.AdamW, 3e-4, 0.05, 312),
        seeds=(0,),
    ),
}


def quantise_model(model: nn.Layer, bits: tuple[int, ...], objective: str = "mean") -> OnceQAT:
    """The model, with the weights that it has, at these widths; its ends at 8 bits."""
    example = make_example_input(3, SIDE)
    ends = end_layers(model, example)
    layers = {path: {"bits": 8} for path in ends}  # whatever the highest of the widths
    return build_once_qat(
        model, {"bits": list(bits), "objective": objective, "layers": layers}, ends
    )


# -- runs ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One run: a training, or models that need none.

    Attributes:
        network: of NETWORKS.
        method: of METHODS.
        bits: widths that are scored.
        seed: of initial weights, samples and widths drawn.
    """

    network: str
    method: str
    bits: tuple[int, ...]
    seed: int

    @property
    def name(self) -> str:
        width = f"_{self.bits[0]}" if self.method == "dedicated" else ""
        return f"{self.network}_{self.method}{width}_{self.seed}"

    @property
    def source(self) -> "Case | None":
        """The run whose weights this one starts from."""
        if self.method == "float":
            return None
        if self.method == "cut":
            return Case(self.network, "dedicated", (8,), self.seed)
        return Case(self.network, "float", (FLOAT_BITS,), self.seed)

    def weights(self, work_dir: Path) -> Path:
        """Where the run's last weights are, once it has ended."""
        return work_dir / self.name / "model.safetensors"


def cases_of(network: str, seed: int) -> Iterator[Case]:
    """The runs of a seed, in order."""
    case = partial(Case, network, seed=seed)
    yield case("float", (FLOAT_BITS,))
    yield case("ptq", WIDTHS)
    yield case("dedicated", WIDTHS[:1])
    yield case("cut", WIDTHS[1:])
    yield case("once_mean", WIDTHS)
    yield case("once_sandwich", WIDTHS)
    for bits in WIDTHS[1:]:
        yield case("dedicated", (bits,))


def open_case(case: Case, work_dir: Path) -> nn.Layer:
    """The model as its run begins."""
    paddle.seed(case.seed)
    network = NETWORKS[case.network]
    model = network.build()
    if case.method == "cut":
        model = quantise_model(model, case.source.bits)  # steps and all come with the weights
    if case.source is not None:
        path = case.source.weights(work_dir)
        assign_weights(model, read_weights(path), str(path))
    if case.method not in ("float", "cut"):
        objective = "sandwich" if case.method == "once_sandwich" else "mean"
        model = quantise_model(model, case.bits, objective)
    return model


def train(case: Case, model: nn.Layer, steps: int, data: Data, work_dir: Path) -> None:
    """Train to the last step, going on where it was, and keep the weights."""
    network, folder = NETWORKS[case.network], RunFolder(work_dir / case.name)
    recipe = network.float if case.method == "float" else network.qat
    groups = make_parameter_groups(model, recipe.weight_decay)
    rate = make_cosine_schedule(steps, round(WARMUP_SHARE * steps), learning_rate=recipe.rate)
    forward, before_step = losses, None
    if isinstance(model, OnceQAT):
        forward, before_step = make_passes(model, losses), partial(draw_widths, model, case.seed)
    folder.open({"run": case.name, "steps": steps})
    trainer = Trainer(
        model,
        recipe.optimizer(learning_rate=rate, parameters=groups),
        Augmented(*data["train"]),
        forward,
        None,
        folder,
        TrainOptions(
            iters=steps,
            batch_size=BATCH,
            log_iters=50,
            save_interval=100,
            keep_checkpoint_max=1,
            seed=case.seed,
            resume="auto",
        ),
        before_step=before_step,
    )
    trainer.callbacks += [ProgressLog(steps, BATCH), ProcessorClock(folder.root)]
    trainer.fit()
    save_weights(collect_arrays(model), case.weights(work_dir))


def run(case: Case, steps: int, data: Data, work_dir: Path) -> list[dict]:
    """Train and score; returns a row per width."""
    model = open_case(case, work_dir)
    trained = case.method not in UNTRAINED
    if trained:
        train(case, model, steps, data, work_dir)
    score, rows = evaluation(*data["val"]), []
    for bits in case.bits:
        if isinstance(model, OnceQAT):
            set_bits(model, bits)  # of cut, below all that `OnceQAT.set_bits` would take
        found = score(model)
        rows.append(
            {
                "network": case.network,
                "method": case.method,
                "bits": bits,
                "seed": case.seed,
                **{name: f"{found[f'Evaluate/{name}']:.4f}" for name in SCORES},
                "steps": steps if trained else 0,
                "images": len(data["train"][0]) if trained else 0,
                "cpu_minutes": f"{spent(work_dir / case.name) / 60 if trained else 0:.2f}",
                "machine": machine(),
            }
        )
    return rows


# -- the table -------------------------------------------------------------------------------------


def order(row: dict) -> tuple:
    return (
        list(NETWORKS).index(row["network"]),
        METHODS.index(row["method"]),
        -int(row["bits"]),
        int(row["seed"]),
    )


def summary(rows: list[dict]) -> list[dict]:
    """Mean and standard deviation (of the sample) over the seeds, for each method and width."""
    return mean_and_spread(rows, ("network", "method", "bits"), (*SCORES, "cpu_minutes"))


def is_finished(case: Case, results: Path) -> bool:
    """Whether the table holds all widths of a run."""
    found = {
        int(row["bits"])
        for row in read_rows(results)
        if (row["network"], row["method"], int(row["seed"]))
        == (case.network, case.method, case.seed)
    }
    return found >= set(case.bits)


def attempt(case: Case, results: Path, work_dir: Path, make: Callable[[Case], list[dict]]) -> bool:
    """Make a run, unless it is made, another process is at it, or what it starts from is not
    there yet; returns whether it was made."""
    if case.source is not None and not case.source.weights(work_dir).exists():
        return False
    with claim_run(work_dir / f"{case.name}.lock") as ours:
        if not ours or is_finished(case, results):
            return False
        logging.info(f"run: {case.name}")
        add_rows(results, make(case), FIELDS, order, summary)
        return True


def share_out(
    cases: list[Case], results: Path, work_dir: Path, make: Callable[[Case], list[dict]]
) -> None:
    """Make all runs, in order as far as they are free; ends when all are in the table, so that the
    runs of a process that stopped are taken over by the others."""
    while left := [case for case in cases if not is_finished(case, results)]:
        if not any(attempt(case, results, work_dir, make) for case in left):
            time.sleep(PAUSE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_root", type=Path, required=True, help="made by `ppvision data`")
    parser.add_argument("--work_dir", type=Path, default=Path("output/layered_cifar10"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--network", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0 1 2, of pale_nano 0")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--float_steps", type=int, help="default: the network's recipe")
    parser.add_argument("--steps", type=int, help="of QAT; default: the network's recipe")
    args = parser.parse_args()
    missing = {"float"} - {*args.methods}
    if missing or ("cut" in args.methods and "dedicated" not in args.methods):
        parser.error("--methods: expected float with any other, and dedicated with cut.")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger().setLevel(logging.INFO)  # some of Paddle's imports set it first
    args.work_dir.mkdir(parents=True, exist_ok=True)
    data = {
        split: read_pictures(args.data_root, args.work_dir, split) for split in ("train", "val")
    }

    def make(case: Case) -> list[dict]:
        network = NETWORKS[case.network]
        if case.method == "float":
            steps = args.float_steps or network.float.steps
        else:
            steps = args.steps or network.qat.steps
        return run(case, steps, data, args.work_dir)

    cases = [
        case
        for network in args.network
        for seed in args.seeds or NETWORKS[network].seeds
        for case in cases_of(network, seed)
        if case.method in args.methods
    ]
    share_out(cases, args.results, args.work_dir, make)
    print(args.results.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
