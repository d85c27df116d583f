"""Train `pale_nano` on Tiny-ImageNet-100 on one GPU, in a given number of seconds.

    python3 -m benchmark.gpu.classification --data data/gpu --output out --seconds 240

Data: `benchmark/gpu/data.py`. The network is `benchmark.torch_pale.Pale`; classes, pale size,
normalisation and teacher are those of
configs/classification/pale_nano_tiny_imagenet_100.yml. Writes
`out/pale_nano_tiny_imagenet_100.pt` and `.json` at each evaluation; `benchmark/gpu/convert.py`
makes weights of ppvision of it. Two things can be done before, each in a process of its own, and
are found again in the data's folder:

    python3 -m benchmark.gpu.classification --only measure   # without any data: the quickest step
    python3 -m benchmark.gpu.classification --only answers   # the teacher's

Differences from the config's recipe: no stochastic depth (the model's 0.05 is next to nothing);
crop and rotation in one map and colours in place of RandAugment; mixup draws a share for each
picture; labels are smoothed. The weight of the distillation is 0.6: the teacher is right for three
pictures of four; where it is not, the label has to say so.
"""

import time

START = time.monotonic()  # PyTorch's import counts

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from benchmark.gpu import teacher as teaching
from benchmark.gpu.common import (
    MODES,
    Clock,
    Ema,
    Snapshot,
    TrainingStep,
    cosine,
    initialise,
    make_adamw,
    open_device,
    parameter_groups,
    save_run,
    set_rate,
    use_shifts,
)
from benchmark.gpu.pictures import DRAWS, augment, read_pictures
from benchmark.torch_pale import Pale

NAME = "pale_nano_tiny_imagenet_100"
CONFIG = Path(__file__).resolve().parents[2] / "configs" / "classification" / f"{NAME}.yml"
SHAPE = (32, (1, 2, 2, 1), (2, 2, 4, 8))  # channels, depths, heads of pale_nano

# Share of the time at which a size of pictures begins. The config's 0.4 of the epochs are about 0.2
# of the time.
SIZES = ((0.0, 32), (0.2, 64))
BATCH, RATE = 512, 2.5e-3  # the config's 1.5e-3 is for batches of 64, this one for short trainings
WEIGHT_DECAY, CLIP_NORM = 0.05, 5.0
SMOOTHING, MIXUP, DISTILLED = 0.1, 0.2, 0.6
EVALUATIONS = 5  # on the way
RESERVED = {"cuda": 8.0, "cpu": 10.0}  # seconds for the last evaluation and the files
SHARES = 2**16  # of mixup, drawn before

# What `--only measure` compares: how a step runs, and how a depthwise convolution is computed. The
# first is what a training takes without measurements.
CANDIDATES = (("graph", "conv"), ("compile", "shift"), ("compile", "conv"))
MEASURED_STEPS = 30


@dataclass(frozen=True)
class Recipe:
    """What the config says."""

    classes: tuple[str, ...]  # WordNet ids, in the order of class numbers
    pale_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    teacher: dict

    @classmethod
    def read(cls, path: Path) -> "Recipe":
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        (normalize,) = (t for t in content["val_dataset"]["transforms"] if t["type"] == "Normalize")
        names = tuple(sorted(content["teacher"]["classes"]))
        pale = content["model"]["pale_size"]
        mean, std = tuple(normalize["mean"]), tuple(normalize["std"])
        return cls(names, pale, mean, std, content["teacher"])


def build(recipe: Recipe, device: torch.device, shifts: bool) -> Pale:
    """A fresh network, in training mode."""
    model = Pale(*SHAPE, num_classes=len(recipe.classes), size=recipe.pale_size)
    initialise(model)
    if shifts:
        use_shifts(model)
    return model.to(device)


@dataclass
class Data:
    """Everything that a step reads, on the device."""

    pictures: Tensor  # [N, S, S, 3] uint8
    labels: Tensor  # [N] int64
    answers: Tensor  # [N, K] float16 logits
    mean: Tensor
    std: Tensor
    shares: Tensor  # [SHARES] of mixup
    temperature: float

    @classmethod
    def make(
        cls, recipe: Recipe, device: torch.device, pictures: Tensor, labels: Tensor, answers: Tensor
    ) -> "Data":
        shares = np.random.default_rng(0).beta(MIXUP, MIXUP, SHARES).astype(np.float32)
        return cls(
            pictures.to(device),
            labels.to(device),
            answers.to(device),
            torch.tensor(recipe.mean, device=device),
            torch.tensor(recipe.std, device=device),
            torch.from_numpy(shares).to(device),
            float(recipe.teacher["temperature"]),
        )


def make_loss(data: Data, size: int) -> Callable[..., Tensor]:
    """The loss of a step on pictures of a size: `loss_of(network, index, draws)`.

    `index` are numbers of pictures, `[B]` int64; `draws` are `[B, DRAWS + 1]`, uniform in [0, 1).
    """

    def loss_of(network: Callable[[Tensor], Tensor], index: Tensor, draws: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(index.device.type, enabled=False):
            x, targets, taught = make_batch(data, size, index, draws)
        logits = network(x).float()
        return mixed_loss(logits, targets, taught, data.temperature)

    return loss_of


def make_batch(
    data: Data, size: int, index: Tensor, draws: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures `[B, 3, size, size]`, targets `[B, K]` and the teacher's shares `[B, K]` at its
    temperature, all mixed with their partners: the batch in reverse."""
    x = augment(data.pictures[index], draws[:, :DRAWS], size, data.mean, data.std)
    answers = data.answers[index].float()  # [B, K]
    taught = F.softmax(answers / data.temperature, dim=1)
    classes = answers.shape[1]
    hard = (data.labels[index, None] == torch.arange(classes, device=index.device)).float()
    targets = hard * (1 - SMOOTHING) + SMOOTHING / classes
    own = data.shares[(draws[:, DRAWS] * SHARES).long()][:, None]  # [B, 1]
    mixed = x * own[:, :, None, None] + x.flip(0) * (1 - own[:, :, None, None])
    mixed = mixed.contiguous(memory_format=torch.channels_last)
    targets, taught = (shares * own + shares.flip(0) * (1 - own) for shares in (targets, taught))
    return mixed, targets, taught


def mixed_loss(logits: Tensor, targets: Tensor, taught: Tensor, temperature: float) -> Tensor:
    """Cross entropy with the labels, and the divergence from the teacher's shares, as in
    `ppvision.tasks.classification.teacher.distillation_loss`."""
    labelled = -(targets * F.log_softmax(logits, dim=1)).sum(1).mean()
    student = F.log_softmax(logits / temperature, dim=1)
    known = taught.clamp(min=torch.finfo(torch.float32).tiny).log()
    distilled = (taught * (known - student)).sum(1).mean() * temperature**2
    return (1 - DISTILLED) * labelled + DISTILLED * distilled


@torch.no_grad()
def evaluate(model: Pale, data: Data, pictures: Tensor, labels: Tensor) -> float:
    """Top-1 of a model in evaluation mode, in float32, on whole pictures."""
    right = 0
    # To try every kernel, as in training, would take longer than the evaluation.
    torch.backends.cudnn.benchmark = False
    for chosen, wanted in zip(pictures.split(500), labels.split(500), strict=True):
        x = chosen.permute(0, 3, 1, 2).float() / 255.0
        x = (x - data.mean[:, None, None]) / data.std[:, None, None]
        found = model(x.contiguous(memory_format=torch.channels_last))
        right += int((found.argmax(1) == wanted).sum())
    torch.backends.cudnn.benchmark = True
    return right / len(labels)


# -- what can be done before -----------------------------------------------------------------------


def answers_path(folder: Path, recipe: Recipe, pictures: int) -> Path:
    """Where the teacher's answers for so many pictures are kept."""
    return folder / f"answers_{recipe.teacher['size']}_{pictures}.npy"


def find_answers(
    folder: Path, recipe: Recipe, device: torch.device, pictures: Tensor, labels: Tensor
) -> Tensor:
    """The teacher's answers for pictures, from a file or computed and put there."""
    options = recipe.teacher
    path = answers_path(folder, recipe, len(labels))
    if path.is_file():
        found = torch.from_numpy(np.load(path))
        print(f"teacher: {path} {teaching.report(found.to(device), labels.to(device))}", flush=True)
        return found
    begun = time.monotonic()
    network = teaching.fuse(teaching.load_teacher(folder / "teacher.npz")).to(device)
    network = network.to(memory_format=torch.channels_last)
    if device.type == "cuda":
        network = network.half()
    columns = teaching.teacher_classes(options["classes"], list(recipe.classes))
    (mean,), (std,) = options["mean"], options["std"]
    found = teaching.answers(
        network,
        pictures.to(device),
        columns=torch.tensor(columns, device=device),
        size=options["size"],
        mean=mean,
        std=std,
        batch=500 if device.type == "cuda" else 50,
    )
    said = teaching.report(found, labels.to(device))
    print(f"teacher: {said} in {time.monotonic() - begun:.1f} s", flush=True)
    part = path.with_suffix(".part.npy")
    np.save(part, found.cpu().numpy())
    part.replace(path)
    return found.cpu()


def measure(folder: Path, recipe: Recipe, device: torch.device, batch: int, seconds: float) -> None:
    """Time each candidate on random pictures; `measured.json` holds pictures per second."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (4 * batch, 64, 64, 3), dtype=torch.uint8, generator=rng)
    labels = torch.randint(0, len(recipe.classes), (len(pictures),), generator=rng)
    answers = torch.randn((len(pictures), len(recipe.classes)), generator=rng).half()
    data = Data.make(recipe, device, pictures, labels, answers)
    speeds: dict[str, dict[str, float]] = {}
    for mode, depthwise in CANDIDATES:
        model = build(recipe, device, depthwise == "shift")
        optimizer = make_adamw(parameter_groups(model, WEIGHT_DECAY), device)
        for size in sorted({size for _, size in SIZES}, reverse=True):
            if time.monotonic() - START > seconds:
                return
            step = _make_step(model, optimizer, data, size, batch, mode)
            if step.mode != mode:  # it does not work here
                continue
            index, draws = _example(data, batch, device)
            _wait(device)
            begun = time.monotonic()
            for _ in range(MEASURED_STEPS):
                step(index, draws)
            _wait(device)
            speed = MEASURED_STEPS * batch / (time.monotonic() - begun)
            print(f"measured: {size} px, {mode}, {depthwise}: {speed:.0f} pictures/s", flush=True)
            speeds.setdefault(str(size), {})[f"{mode} {depthwise}"] = round(speed, 1)
            part = folder / "measured.part"
            part.write_text(json.dumps(speeds))
            part.replace(folder / "measured.json")


def choose(folder: Path, mode: str, device: torch.device) -> tuple[str, bool]:
    """How steps run, and whether depthwise convolutions are shifts.

    The quickest that was measured at the largest size; without measurements PyTorch's own kernels
    in a graph, which need no time to compile.
    """
    if mode != "auto":
        return mode, mode == "compile"
    path, largest = folder / "measured.json", str(max(size for _, size in SIZES))
    speeds = json.loads(path.read_text()).get(largest, {}) if path.is_file() else {}
    chosen, depthwise = max(speeds, key=speeds.get).split() if speeds else CANDIDATES[0]
    print(f"steps: {chosen}, {depthwise} (measured: {speeds or 'nothing'})", flush=True)
    return chosen, depthwise == "shift"


def _example(data: Data, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    index = torch.arange(batch, device=device) % len(data.labels)
    return index, torch.rand((batch, DRAWS + 1), device=device)


def _make_step(
    model: Pale,
    optimizer: torch.optim.Optimizer,
    data: Data,
    size: int,
    batch: int,
    mode: str,
) -> TrainingStep:
    inputs = _example(data, batch, data.labels.device)
    return TrainingStep(
        model, optimizer, make_loss(data, size), inputs, clip_norm=CLIP_NORM, mode=mode
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


# -- the training ----------------------------------------------------------------------------------


class Order:
    """Batches of numbers of pictures, each pass in a new random order. The last, smaller batch of a
    pass is left out."""

    def __init__(self, count: int, batch: int, device: torch.device) -> None:
        if count < batch:
            raise ValueError(f"--batch: expected at most {count} pictures, got {batch}.")
        self._count, self._batch, self._device = count, batch, device
        self._order, self._place = torch.empty(0), count

    def next(self) -> Tensor:
        if self._place + self._batch > self._count:
            self._order, self._place = torch.randperm(self._count, device=self._device), 0
        found = self._order[self._place : self._place + self._batch]
        self._place += self._batch
        return found


class Training:
    """One training: its state, and what is said and written of it.

    Args:
        args: of the command line.
        recipe: the config's.
        device: where it runs.
    """

    def __init__(self, args: argparse.Namespace, recipe: Recipe, device: torch.device) -> None:
        self.args, self.device, self.rate = args, device, args.rate
        pictures, labels = read_pictures(args.data / "train.npz", args.per_class)
        self.val = [t.to(device) for t in read_pictures(args.data / "val.npz", args.per_class)]
        said = time.monotonic() - START
        print(f"pictures: {len(labels)} and {len(self.val[1])} after {said:.1f} s", flush=True)
        answers = find_answers(args.data, recipe, device, pictures, labels)
        self.data = Data.make(recipe, device, pictures, labels, answers)
        mode, shifts = choose(args.data, args.mode, device)
        self.model = build(recipe, device, shifts)
        groups = parameter_groups(self.model, WEIGHT_DECAY)
        self.optimizer = make_adamw(groups, device)
        self.steps = {
            size: _make_step(self.model, self.optimizer, self.data, size, args.batch, mode)
            for _, size in SIZES
        }
        self.shifts = shifts
        self.ema = Ema(self.model)
        self.history: list[dict] = []
        self.returns = 0
        self.done = dict.fromkeys(self.steps, 0)

    def run(self) -> None:
        setup = time.monotonic() - START
        seconds = self.args.seconds - setup - RESERVED[self.device.type]
        if seconds <= 0:
            raise SystemExit(f"--seconds: expected more than {setup:.0f} s, which setting up took.")
        print(f"training for {seconds:.0f} s; {setup:.1f} s set up", flush=True)
        self.clock = Clock(seconds)
        self.setup_seconds = round(setup, 1)
        order = Order(len(self.data.labels), self.args.batch, self.device)
        evaluated, said, loss = 0, 0.0, torch.zeros(())
        kept = Snapshot(self.model, self.optimizer)
        while not self.clock.ended:
            used = self.clock.used
            size = [size for begin, size in SIZES if begin <= used][-1]
            set_rate(self.optimizer, self.rate * cosine(used))
            draws = torch.rand((self.args.batch, DRAWS + 1), device=self.device)
            loss = self.steps[size](order.next(), draws)
            self.ema.update()
            self.done[size] += 1
            if self.clock.elapsed - said > seconds / 30:
                said = self.clock.elapsed
                self.say(size, float(loss))
                kept = self.keep_or_return(kept, float(loss))
            if int(used * (EVALUATIONS + 1)) > evaluated:
                evaluated += 1
                self.evaluate_and_save(float(loss))
        self.evaluate_and_save(float(loss), last=True)

    def say(self, size: int, loss: float) -> None:
        steps = sum(self.done.values())
        speed = steps * self.args.batch / self.clock.elapsed
        print(
            f"{self.clock.elapsed:6.1f} s  {self.clock.used:4.0%}  step {steps}  {size} px  "
            f"loss {loss:.4f}  {speed:.0f} pictures/s so far",
            flush=True,
        )

    def keep_or_return(self, kept: Snapshot, loss: float) -> Snapshot:
        """Keep the state while loss and weights are finite; otherwise go back to what was kept,
        with half of the learning rate."""
        norms = torch.stack(torch._foreach_norm([p.detach() for p in self.model.parameters()]))
        if math.isfinite(loss) and bool(norms.isfinite().all()):
            return Snapshot(self.model, self.optimizer)
        kept.restore()
        self.ema.restart()
        self.rate /= 2
        self.returns += 1
        print(
            f"loss {loss}, not all is finite: back to the last state, rate {self.rate}", flush=True
        )
        return kept

    def evaluate_and_save(self, loss: float, last: bool = False) -> None:
        elapsed = self.clock.elapsed
        self.model.eval()
        scores = {
            "averaged": evaluate(self.ema.model, self.data, *self.val),
            "last": evaluate(self.model, self.data, *self.val),
        }
        self.model.train()
        steps = sum(self.done.values())
        row = {"seconds": round(elapsed, 1), "steps": steps, "loss": round(loss, 4), **scores}
        self.history.append(row)
        print(f"top1 {row}", flush=True)
        save_run(self.args.output, NAME, self.ema.model.state_dict(), self.record(last))

    def record(self, finished: bool) -> dict:
        seen = sum(self.done.values()) * self.args.batch
        return {
            "top1": self.history[-1]["averaged"],
            "top1_of": f"{len(self.val[1])} pictures of val.zip, averaged weights, float32",
            "finished": finished,
            "steps": sum(self.done.values()),
            "steps_by_size": self.done,
            "epochs": round(seen / len(self.data.labels), 2),
            "pictures": len(self.data.labels),
            "given_seconds": self.args.seconds,
            "setup_seconds": self.setup_seconds,
            "batch": self.args.batch,
            "rate": self.rate,
            "returns_after_infinite_losses": self.returns,
            "seed": self.args.seed,
            "mode": {size: step.mode for size, step in self.steps.items()},
            "depthwise_as_shifts": self.shifts,
            "history": self.history,
            **self.clock.facts(self.device),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data/gpu"))
    parser.add_argument("--output", type=Path, default=Path("out"))
    parser.add_argument("--seconds", type=float, default=240, help="for the whole process")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--mode", default="auto", choices=MODES)
    parser.add_argument("--only", choices=["measure", "answers"])
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--rate", type=float, default=RATE)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--per_class", type=int, help="train and validate on so many pictures each")
    args = parser.parse_args()
    device = open_device(args.device, args.seed)
    recipe = Recipe.read(CONFIG)
    if args.only == "measure":
        measure(args.data, recipe, device, args.batch, args.seconds)
    elif args.only == "answers":
        pictures, labels = read_pictures(args.data / "train.npz", args.per_class)
        find_answers(args.data, recipe, device, pictures, labels)
    else:
        Training(args, recipe, device).run()


if __name__ == "__main__":
    main()
