"""Many small trainings of segmentation on one GPU, one row of scores per run.

    python benchmark/gpu/segmentation.py --runs experiments --data .gpu/extra --output OUT \\
        --weights pale_nano.pt --seconds 420

`--runs` is a list of runs as a JSON file, or the name of one written here (`PLANS`); a run is what
`Run` says. Several run side by side in one process (`--lanes`), each a captured CUDA graph on a
stream of its own: a small network's kernels are too short to fill a GPU. A run whose starting
weights are not there yet is passed over until they are. Each finished run adds a line to
OUT/segmentation.jsonl; runs with `save` leave their weights there.

`--device cpu` is for trials.
"""

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmark.gpu.common import (
    Ema,
    TrainingStep,
    autocast,
    initialise,
    make_adamw,
    open_device,
    parameter_groups,
    set_rate,
)
from benchmark.gpu.segmentation_networks import (
    SegFormer,
    choose_depthwise,
    multiply_adds,
    start_forms,
)
from benchmark.gpu.segmentation_pictures import (
    IGNORED,
    SCENES_OF_DIGITS,
    Augmentation,
    Group,
    Normalise,
    Table,
    compose_scenes,
    cut,
    draw,
    group_by_size,
    read_pairs,
)
from benchmark.gpu.segmentation_scores import Scoring, other_class_near
from benchmark.sdn_forms import COMPARED

ROWS = "segmentation.jsonl"
POINTS = 10  # of a learning curve
CURVE_SIDE = 400  # pixels: pictures of a larger side are not in the curve, which has to be cheap
EDGE = 2  # pixels on both sides of a boundary that a guidance by boundaries has to find
MARGIN = 12.0  # seconds before the end for the last evaluations
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALVES = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class DataSet:
    """What is known about a data set.

    Attributes:
        classes: how many.
        how: its training pictures vary.
        loss: weight of each class; None is 1.
        mean, std: of Normalize.
    """

    classes: int
    how: Augmentation
    loss: tuple[float, ...] | None = None
    mean: tuple[float, ...] = IMAGENET[0]
    std: tuple[float, ...] = IMAGENET[1]


DATA = {
    # A border between touching nuclei is rare: 1 in 100 pixels. The weights are the config's.
    "nuclei": DataSet(3, Augmentation((224, 224), (0.75, 1.5), turn=True), (1.0, 1.0, 5.0)),
    "facade": DataSet(8, Augmentation((224, 224), (0.75, 1.75))),
    "digits": DataSet(
        11, Augmentation((112, 112), (0.75, 1.25), mirror=False), None, HALVES[0], HALVES[1]
    ),
}


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        data: a name of `DATA`.
        form: a name of `FORMS`.
        seed: of initial values and batches.
        init: `scratch` or `pretrained` (the file of `--weights`).
        steps: at most; the learning rate ends there.
        seconds: None, or a share of the whole time: the learning rate follows the clock, and ends
            when this run has had so many seconds.
        batch: pictures of a step.
        rate: greatest learning rate.
        weight_decay: of everything but norms and biases.
        auxiliary: factor of the loss of a guidance's own head.
        loss: weights of the classes in place of the data set's.
        ema: whether the averaged weights are scored and saved.
        save: None, or the first part of the name of the file of weights, whose second is the form;
            of several runs with one name the best by Boundary IoU stays (mIoU for digits).
        mode: of `TrainingStep`.
        filler: for the time while others wait.
    """

    data: str
    form: str = "none"
    seed: int = 0
    init: str = "pretrained"
    steps: int = 2000
    seconds: float | None = None
    batch: int = 16
    rate: float = 6e-4
    weight_decay: float = 0.01
    auxiliary: float = 0.4
    loss: tuple[float, ...] | None = None
    ema: bool = False
    save: str | None = None
    mode: str = "graph"
    pale_size: int = 7
    filler: bool = False

    @property
    def name(self) -> str:
        return f"{self.data} {self.form} {self.init} {self.seed}"

    @property
    def kind(self) -> tuple:
        """Runs of one kind can use one captured step."""
        return (
            *(self.data, self.form, self.batch, self.mode, self.pale_size, self.auxiliary),
            *(self.weight_decay, self.loss),
        )


LATER = ("central_auxiliary", "classes_detached", "sdn_two_steps", "boundary", "sdn_detached")
SETS = ("nuclei", "facade")


def experiments() -> list[Run]:
    """Transfer and forms of SDN, the most important first."""
    seeds = (0, 1, 2)
    runs = [Run(data, "none", seed) for seed in seeds for data in SETS]
    runs += [Run(data, "none", seed, "scratch") for seed in seeds for data in SETS]
    runs += [Run(data, form, 0) for form in COMPARED[1:] for data in SETS]
    runs += [Run(data, form, seed) for seed in seeds[1:] for form in COMPARED[1:] for data in SETS]
    runs += [Run(data, form, 0) for form in LATER for data in SETS]
    runs += [
        Run(data, form, seed, "scratch", filler=True)
        for seed in seeds
        for form in COMPARED[1:]
        for data in SETS
    ]
    return runs


def final() -> list[Run]:
    """The weights of the zoo. Steps bound what the clock would leave more of."""
    nuclei = Run("nuclei", "sdn", 0, steps=12_000, seconds=1.0, ema=True, save="nuclei")
    return [
        Run(
            *("digits", "none", 0, "scratch", 120_000, 1.0, 64),
            rate=1e-3,
            weight_decay=0.02,
            ema=True,
            save="digit_scenes",
        ),
        nuclei,
        replace(nuclei, form="classes"),
    ]


PLANS = {"experiments": experiments, "final": final}


def read_runs(source: str) -> list[Run]:
    """A plan by name, or the runs of a JSON file."""
    if source in PLANS:
        return PLANS[source]()
    runs = json.loads(Path(source).read_text(encoding="utf-8"))
    for run in runs:
        if run.get("loss") is not None:
            run["loss"] = tuple(run["loss"])
    return [Run(**run) for run in runs]


# -- data ------------------------------------------------------------------------------------------


Pairs = list[tuple[np.ndarray, np.ndarray]]


def read_data(name: str, options: argparse.Namespace) -> tuple[Pairs, Pairs]:
    """Training and validation pictures of a data set, with their label maps."""
    begun = time.monotonic()
    if name == "digits":
        path = options.data / SCENES_OF_DIGITS
        processes = min(options.processes, len(os.sched_getaffinity(0)))
        train = compose_scenes(path, "train", options.scenes, 1, processes=processes)
        val = compose_scenes(path, "val", options.val_scenes, 0, processes=processes)
    else:
        train, val = (read_pairs(options.data / f"{name}.zip", split) for split in ("train", "val"))
        val = val[: options.val_pictures]
    say(f"{name}: {len(train)} + {len(val)} pictures in {time.monotonic() - begun:.1f} s")
    return train, val


class Pictures:
    """One data set on the device."""

    def __init__(
        self, name: str, train: Pairs, val: Pairs, crop: int | None, device: torch.device
    ) -> None:
        known = DATA[name]
        self.name, self.classes, self.how = name, known.classes, known.how
        if crop:
            self.how = replace(self.how, crop=(crop, crop))
        self.table = Table(train, device)
        self.groups = group_by_size(val, device)
        self.curve = [g for g in self.groups if max(g.labels.shape[1:]) <= CURVE_SIDE]
        self.normalise = Normalise(known.mean, known.std, device)


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


# -- one run ---------------------------------------------------------------------------------------


def new_model(run: Run) -> SegFormer:
    """Initial values on the CPU."""
    torch.manual_seed(run.seed)
    model = SegFormer(DATA[run.data].classes, run.form, pale_size=run.pale_size)
    initialise(model)
    start_forms(model)
    return model


def load_backbone(model: SegFormer, path: Path) -> None:
    """The weights of a classifier's stages, in place.

    Raises:
        ValueError: a part of the stages is not in the file, or of another shape.
    """
    given = torch.load(path, map_location="cpu", weights_only=True)
    given = {name.removeprefix("_orig_mod."): value for name, value in given.items()}
    own = model.pale.state_dict()
    wanted = {name for name in own if name.startswith(("merges.", "merge_norms.", "stages."))}
    wrong = sorted(n for n in wanted if n not in given or given[n].shape != own[n].shape)
    if wrong:
        raise ValueError(f"{path}: expected weights of pale_nano, misses {wrong[:5]} ...")
    model.pale.load_state_dict(own | {name: given[name] for name in wanted})


class Trainer:
    """A model with its captured step, for one run after another of one kind."""

    def __init__(self, run: Run, pictures: Pictures, device: torch.device) -> None:
        self.kind, self.pictures, self.device = run.kind, pictures, device
        model = new_model(run)
        self.multiply_adds = multiply_adds(model, 224, 224)
        self.model = model.to(device).train()
        self.ema = Ema(self.model) if run.ema else None
        self.parameters = sum(p.numel() for p in self.model.parameters())
        groups = parameter_groups(self.model, run.weight_decay)
        self.optimizer = make_adamw(groups, device)
        weights = DATA[run.data].loss if run.loss is None else run.loss
        self._weights = None if weights is None else torch.tensor(weights, device=device)
        self._auxiliary = run.auxiliary
        rng = np.random.default_rng(0)
        example = draw(pictures.table, pictures.how, run.batch, 1, rng)[0]
        self.step = TrainingStep(
            self.model, self.optimizer, self._loss, [example], clip_norm=1.0, mode=run.mode
        )

    def _loss(self, network: nn.Module, numbers: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            image, label = cut(self.pictures.table, numbers, self.pictures.how)
            image = self.pictures.normalise(image)
        logits, guidance = network(image)
        loss = F.cross_entropy(logits, label, self._weights, ignore_index=IGNORED)
        if guidance is None:
            return loss
        if guidance.shape[1] > 1:
            extra = F.cross_entropy(guidance, label, self._weights, ignore_index=IGNORED)
        else:
            extra = boundary_loss(guidance[:, 0], label)
        return loss + self._auxiliary * extra

    @torch.no_grad()
    def restart(self, run: Run, weights: Path | None) -> None:
        """Initial values and an optimiser without a past, in the tensors that the graph knows."""
        fresh = new_model(run)
        if run.init != "scratch":
            load_backbone(fresh, weights)
        self.model.load_state_dict(fresh.state_dict())
        for state in self.optimizer.state.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    value.zero_()
        if self.ema is not None:
            self.ema.model.load_state_dict(fresh.state_dict())
            self.ema.steps = 0


def boundary_loss(logits: Tensor, label: Tensor) -> Tensor:
    """Binary cross entropy of boundaries, which are few: both kinds of pixels weigh alike (as
    PaddleSeg's BCELoss with `weight: dynamic`)."""
    classes = torch.where(label == IGNORED, -1, label).float()
    edge = other_class_near(classes, EDGE, False)
    known = (label != IGNORED).float()
    positive, negative = edge.float() * known, (~edge).float() * known
    total = known.sum().clamp(min=1)
    weight = positive * negative.sum() + negative * positive.sum()
    losses = F.binary_cross_entropy_with_logits(logits, positive, reduction="none")
    return 2 * (losses * weight / total).sum() / total


@torch.no_grad()
def score(model: SegFormer, pictures: Pictures, groups: list[Group], exact: bool) -> Scoring:
    """Count a model's predictions on whole pictures, each at its own size.

    Args:
        model: is left in the mode that it is in.
        pictures: of the data set.
        groups: that are predicted.
        exact: in float32 (TF32 products), as `ppvision eval`; otherwise as in training.
    """
    device = groups[0].labels.device
    scoring = Scoring(pictures.classes, device)
    was_training = model.training
    model.eval()
    # No search for the best kernels: each size is met once.
    torch.backends.cudnn.benchmark = False
    for group in groups:
        with autocast(device, not exact):
            logits = model(pictures.normalise(group.images))
        scoring.update(logits.argmax(dim=1), group.labels)
    torch.backends.cudnn.benchmark = True
    model.train(was_training)
    return scoring


def rate_at(share: float, run: Run) -> float:
    """A linear rise over a tenth, then a polynomial of power 0.9, as in our configs."""
    if share < 0.1:
        return run.rate * (share / 0.1) + 1e-6
    return run.rate * max(0.0, 1 - (share - 0.1) / 0.9) ** 0.9


@dataclass
class Lane:
    """Where one run after another is trained, beside other lanes.

    Attributes:
        run, trainer: in work, or None.
        step: how many steps of the run are done.
        curve: `(step, seconds, scoring)` so far.
        last: the counts of the end, once it is trained.
    """

    number: int
    device: torch.device
    run: Run | None = None
    trainer: Trainer | None = None
    numbers: Tensor | None = None
    step: int = 0
    begun: float = 0.0
    until: float = 0.0
    ended: float = 0.0
    curve: list[tuple[int, float, Scoring]] = field(default_factory=list)
    last: Scoring | None = None
    done: object = None

    def __post_init__(self) -> None:
        cuda = self.device.type == "cuda"
        self.stream = torch.cuda.Stream() if cuda else None
        self.eval_stream = torch.cuda.Stream() if cuda else None

    @contextmanager
    def on(self, stream: object, after: object = None) -> Iterator[None]:
        if stream is None:
            yield
            return
        if after is not None:
            stream.wait_stream(after)
        with torch.cuda.stream(stream):
            yield

    def start(self, run: Run, trainer: Trainer, weights: Path | None, seconds: float) -> None:
        self.run, self.trainer = run, trainer
        self.step, self.curve, self.last = 0, [], None
        with self.on(self.stream, torch.cuda.current_stream() if self.stream else None):
            trainer.restart(run, weights)
            self._draw()
        self.begun = time.monotonic()
        self.until = self.begun + seconds

    def _draw(self) -> None:
        """The next numbers, for 1,000 steps at most: a long run has more than fit."""
        rng = np.random.default_rng([self.run.seed, self.step])
        count = min(1000, self.run.steps - self.step)
        pictures = self.trainer.pictures
        self.numbers = draw(pictures.table, pictures.how, self.run.batch, max(1, count), rng)

    @property
    def share(self) -> float:
        by_steps = self.step / self.run.steps
        if self.run.seconds is None:
            return by_steps
        now = time.monotonic()
        return min(1.0, max(by_steps, (now - self.begun) / (self.until - self.begun)))

    def advance(self) -> bool:
        """One step; a point of the curve where it is due. Returns whether the training is over."""
        with self.on(self.stream):
            if self.step and self.step % 1000 == 0:
                self._draw()
            set_rate(self.trainer.optimizer, rate_at(self.share, self.run))
            self.trainer.step(self.numbers[self.step % 1000])
            if self.trainer.ema is not None:
                self.trainer.ema.update()
        self.step += 1
        share = self.share
        if share >= 1.0:
            self._finish()
            return True
        if share >= (len(self.curve) + 1) / POINTS:
            self._add_point()
        return False

    def _add_point(self) -> None:
        pictures = self.trainer.pictures
        if pictures.curve:
            with self.on(self.eval_stream, self.stream):
                found = score(self.scored, pictures, pictures.curve, exact=False)
            if self.stream is not None:
                self.stream.wait_stream(self.eval_stream)
            self.curve.append((self.step, time.monotonic() - self.begun, found))

    @property
    def scored(self) -> SegFormer:
        """The model that counts: the average where there is one."""
        return self.trainer.model if self.trainer.ema is None else self.trainer.ema.model

    def _finish(self) -> None:
        self._add_point()
        self.ended = time.monotonic()
        pictures = self.trainer.pictures
        with self.on(self.eval_stream, self.stream):
            self.last = score(self.scored, pictures, pictures.groups, exact=True)
            if self.stream is not None:
                self.done = torch.cuda.Event()
                self.done.record()

    @property
    def scored_all(self) -> bool:
        return self.last is not None and (self.done is None or self.done.query())

    def row(self) -> dict[str, object]:
        """What the run found."""
        with self.on(self.eval_stream):
            scores = {name: round(v, 4) for name, v in self.last.compute().items()}
            curve = [
                [step, round(seconds, 1), *(round(v, 4) for v in found.compute().values())]
                for step, seconds, found in self.curve
            ]
        run = asdict(self.run)
        return {
            **{key: run[key] for key in ("data", "form", "seed", "init", "batch", "rate")},
            "steps": self.step,
            "seconds": round(self.ended - self.begun, 1),
            **scores,
            "parameters": self.trainer.parameters,
            "multiply_adds": self.trainer.multiply_adds,
            "crop": self.trainer.pictures.how.crop,
            "pale_size": run["pale_size"],
            "ema": run["ema"],
            "loss": run["loss"] or DATA[run["data"]].loss,
            "mode": self.trainer.step.mode,
            "curve_columns": ["step", "seconds", "mIoU", "BoundaryIoU", "BoundaryF3"],
            "curve": curve,
        }


# -- many runs -------------------------------------------------------------------------------------


class Runner:
    """Runs side by side until they are done or the time is over."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.begun = time.monotonic()
        self.runs = list(read_runs(options.runs))
        if options.steps:
            self.runs = [replace(run, steps=options.steps) for run in self.runs]
        if options.batch:
            self.runs = [replace(run, batch=options.batch) for run in self.runs]
        if options.only:
            self.runs = [run for run in self.runs if run.data in options.only]
        # Before the GPU is opened: scenes are composed by forked processes.
        pairs = {}
        for name in dict.fromkeys(run.data for run in self.runs):
            try:
                pairs[name] = read_data(name, options)
            except Exception:  # the other data sets go on
                say(f"{name} cannot be read")
                traceback.print_exc()
        self.runs = [run for run in self.runs if run.data in pairs]
        self.device = open_device(options.device, 0)
        self.pictures = {
            name: Pictures(name, *pairs.pop(name), options.crop, self.device)
            for name in list(pairs)
        }
        say(f"depthwise convolutions: {choose_depthwise(self.device)}")
        self.lanes = [Lane(number, self.device) for number in range(options.lanes)]
        if self.device.type == "cuda":  # one stream for evaluations: memory is kept per stream
            for lane in self.lanes:
                lane.eval_stream = self.lanes[0].eval_stream
        self._idle: list[Trainer] = []
        self._taken: dict[tuple, float] = {}  # seconds that a run of a kind took
        self._best: dict[str, tuple[float, Path]] = {}
        options.output.mkdir(parents=True, exist_ok=True)

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.begun

    @property
    def left(self) -> float:
        return self.options.seconds - self.elapsed

    @cached_property
    def gpu(self) -> str | None:
        return torch.cuda.get_device_name() if self.device.type == "cuda" else None

    def has_weights(self) -> bool:
        return self.options.weights is not None and self.options.weights.exists()

    def next_run(self) -> Run | None:
        """The first one that can start and end in time; fillers only while others wait."""
        ready = [run for run in self.runs if run.init == "scratch" or self.has_weights()]
        for run in ready:
            if run.seconds is None and self._estimate(run) > self.left - MARGIN:
                continue
            if run.seconds is not None and self.left < 2 * MARGIN:
                continue
            self.runs.remove(run)
            return run
        return None

    def _estimate(self, run: Run) -> float:
        if not self._taken:
            return 0.0
        known = [s for kind, s in self._taken.items() if kind[:2] == (run.data, run.form)]
        return max(known or [max(self._taken.values())])

    def waiting(self) -> bool:
        """Whether runs may still come to be ready."""
        pending = any(run.init != "scratch" for run in self.runs)
        return pending and not self.has_weights() and self.elapsed < self.options.wait

    def trainer_for(self, run: Run) -> Trainer:
        for trainer in self._idle:
            if trainer.kind == run.kind and (trainer.ema is not None) == run.ema:
                self._idle.remove(trainer)
                return trainer
        if len(self._idle) >= self.options.keep:
            self._idle.pop(0)
        return Trainer(run, self.pictures[run.data], self.device)

    def work(self) -> None:
        while self.left > 0:
            busy = [lane for lane in self.lanes if lane.run is not None]
            for lane in self.lanes:
                if lane.run is None and self._begin(lane):
                    busy.append(lane)
            if not busy:
                if not self.waiting():
                    break
                time.sleep(0.2)
                continue
            for lane in busy:
                self._move(lane)
        unfinished = [lane.run.name for lane in self.lanes if lane.run is not None]
        say(
            f"end after {self.elapsed:.0f} s; not finished: {unfinished}; not begun: "
            f"{len([run for run in self.runs if not run.filler])}"
        )

    def _begin(self, lane: Lane) -> bool:
        run = self.next_run()
        if run is None:
            return False
        try:
            trainer = self.trainer_for(run)
            seconds = self.left - MARGIN
            if run.seconds is not None:
                seconds *= run.seconds
            lane.start(run, trainer, self.options.weights, seconds)
        except Exception:  # one run must not end all
            self._failed(lane, run)
            return False
        say(f"lane {lane.number}: {run.name}")
        return True

    def _failed(self, lane: Lane, run: Run) -> None:
        say(f"lane {lane.number}: {run.name} failed")
        traceback.print_exc()
        sys.stderr.flush()
        lane.run = lane.trainer = None
        self._idle.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _move(self, lane: Lane) -> None:
        run = lane.run
        try:
            if lane.last is None:
                before = len(lane.curve)
                lane.advance()
                if len(lane.curve) > before and run.save and lane.share >= 0.5:
                    self._save(lane, self.options.scratch)
            elif lane.scored_all:
                self._end(lane)
        except Exception:
            self._failed(lane, run)

    def _end(self, lane: Lane) -> None:
        run, row = lane.run, lane.row()
        row |= {"gpu": self.gpu, "lanes": len(self.lanes), "torch": torch.__version__}
        with (self.options.output / ROWS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self._taken[run.kind] = row["seconds"]
        say(
            f"lane {lane.number}: {run.name}: {row['steps']} steps, {row['seconds']} s, mIoU "
            f"{row['mIoU']}, Boundary IoU {row['BoundaryIoU']}, F3 {row['BoundaryF3']}"
        )
        if run.save:
            value = row["mIoU" if run.data == "digits" else "BoundaryIoU"]
            best, path = self._best.get(run.save, (-1.0, None))
            if value > best:
                self._best[run.save] = value, self._save(lane, self.options.output)
                if path is not None and path != self._best[run.save][1]:
                    path.unlink()
        self._idle.append(lane.trainer)
        lane.run = lane.trainer = None

    def _save(self, lane: Lane, folder: Path) -> Path:
        """The weights that count, as `NAME_FORM.pt`: a state dict."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{lane.run.save}_{lane.run.form}.pt"
        with lane.on(lane.eval_stream):
            state = {k: v.detach().cpu() for k, v in lane.scored.state_dict().items()}
        torch.save(state, path.with_suffix(".part"))
        os.replace(path.with_suffix(".part"), path)
        return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", required=True, help=f"{', '.join(PLANS)}, or a JSON file")
    parser.add_argument("--data", type=Path, required=True, help="folder of the packed data sets")
    parser.add_argument("--output", type=Path, required=True, help="folder of rows and weights")
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/segmentation"))
    parser.add_argument("--weights", type=Path, help="of a classifier; may come to be there later")
    parser.add_argument("--wait", type=float, default=300.0, help="seconds for --weights")
    parser.add_argument("--seconds", type=float, default=420.0, help="for everything")
    parser.add_argument("--lanes", type=int, default=4, help="runs side by side")
    parser.add_argument("--keep", type=int, default=4, help="captured steps kept for later runs")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--processes", type=int, default=12, help="that compose digit scenes")
    parser.add_argument("--scenes", type=int, default=16_000, help="digit scenes to train on")
    parser.add_argument("--val_scenes", type=int, default=240)
    parser.add_argument("--val_pictures", type=int, help="of a trial: the first so many")
    parser.add_argument("--only", nargs="+", choices=tuple(DATA), help="data sets")
    parser.add_argument("--steps", type=int, help="of a trial, in place of each run's")
    parser.add_argument("--batch", type=int, help="of a trial, in place of each run's")
    parser.add_argument("--crop", type=int, help="of a trial, in place of the data set's")
    Runner(parser.parse_args()).work()


if __name__ == "__main__":
    main()
