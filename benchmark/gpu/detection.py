"""Train `ppyoloe_pale_nano` on blood cells on one GPU, in a given time.

    python -m ppvision data bccd --source BCCD --output data/bccd
    python benchmark/gpu/detection.py pack --folder data/bccd --data bccd.npz
    bash benchmark/gpu/detection.sh 300 --data bccd.npz --output output/gpu \\
        --backbone output/gpu/pale_nano_tiny_imagenet_100.pt --wait 60
    python benchmark/gpu/detection.py convert --weights output/gpu/ppyoloe_pale_nano.pt \\
        --output output/ppyoloe_pale_nano.safetensors

`train` needs PyTorch, NumPy and OpenCV. It writes the averaged weights and a record with their
scores on the val split; no step is chosen by it. `convert` gives weights that `ppvision eval
--model_path` takes.
"""

import argparse
import json
import math
import sys
import time
from dataclasses import asdict
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor, nn

from benchmark.gpu.common import (
    MODES,
    Clock,
    Ema,
    TrainingStep,
    cosine,
    make_adamw,
    open_device,
    parameter_groups,
    save_run,
    set_rate,
)
from benchmark.gpu.detection_losses import Targets, detection_losses
from benchmark.gpu.detection_networks import (
    Detector,
    load_backbone,
    ppyoloe_pale_nano,
    to_paddle,
)
from benchmark.gpu.detection_pictures import (
    Looks,
    Split,
    Views,
    normalised,
    pack,
    read_pack,
    resized,
)
from benchmark.gpu.detection_scores import average_precision, summarise, suppress

STATIC_SHARE = 0.1  # of the time, in which objects are assigned by distance (our choice)
PLAIN_SHARE = 0.15  # of the time, at the end, without views made of four pictures (after YOLOX)
CHECKS = (1 / 3, 2 / 3)  # shares of the time at which the val split is scored on the way
CLIP_NORM = 10.0  # of the config
EVAL_BATCH = 16
SIDE = 32  # the coarsest stride


@torch.no_grad()
def evaluate(
    model: Detector, split: Split, names: list[str], size: tuple[int, int]
) -> dict[str, float]:
    """Scores of a model in evaluation mode, in float32, on pictures resized to `size`."""
    device = next(model.parameters()).device
    height, width = split.pictures.shape[1:3]
    back = torch.tensor([width / size[1], height / size[0]] * 2, device=device)
    pictures, found = torch.from_numpy(resized(split.pictures, size)), []
    exact = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    for batch in pictures.split(EVAL_BATCH):
        boxes, scores = model.yolo_head.boxes(model(normalised(batch.to(device))))
        arrays = ((boxes * back).cpu().numpy(), scores.cpu().numpy())
        found += [suppress(*picture) for picture in zip(*arrays, strict=True)]
    torch.set_float32_matmul_precision(exact[0])
    torch.backends.cudnn.allow_tf32 = exact[1]
    table = average_precision(found, split.boxes, split.classes, len(names))
    return {name: round(value, 4) for name, value in summarise(table, names).items()}


def is_finished(path: Path) -> bool:
    """Whether the record beside weights of `save_run` says that their training is over; a training
    writes both on the way as well."""
    record = path.with_suffix(".json")
    return path.is_file() and record.is_file() and json.loads(record.read_text())["finished"]


def wait_for(path: Path, seconds: float) -> tuple[dict[str, Tensor], str]:
    """A state dict that another process writes, as it is when that is finished or the time is over.

    Returns:
        It, and what its record says of it.

    Raises:
        FileNotFoundError: it did not come in time.
    """
    end = time.monotonic() + seconds
    while not is_finished(path) and time.monotonic() < end:
        time.sleep(0.5)
    state = torch.load(path, map_location="cpu", weights_only=True)
    record = json.loads(path.with_suffix(".json").read_text())
    known = {key: record.get(key) for key in ("finished", "steps", "top1")}
    return state, ", ".join(f"{key} {value}" for key, value in known.items())


def start_backbone(model: Detector, path: Path | None, seconds: float) -> str:
    """Give the backbone a classifier's weights; returns what it starts from.

    Whatever is wrong with the file, the training goes on from scratch: its time is booked.
    """
    if path is None:
        return "scratch"
    try:
        state, known = wait_for(path, seconds)
        return f"{path.name} ({known}): {load_backbone(model, state)} tensors"
    except Exception as error:  # of a file that another process wrote, of whatever kind
        return f"scratch: {path.name} fails ({type(error).__name__}: {error})"[:300]


def loss_of(
    network: nn.Module,
    images: Tensor,
    boxes: Tensor,
    classes: Tensor,
    real: Tensor,
    static: Tensor,
    head: nn.Module,
) -> Tensor:
    raw = network(images)
    with torch.autocast(images.device.type, enabled=False):
        return detection_losses(head, raw, Targets(boxes, classes, real), static=static)["loss"]


class Guard:
    """Goes back to the last good averaged weights when a loss is no number.

    Attributes:
        factor: of the learning rate, halved each time.
        times: how often it went back.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema) -> None:
        self._model, self._optimizer, self._ema = model, optimizer, ema
        self.factor, self.times = 1.0, 0
        self._keep()

    def _keep(self) -> None:
        self._good = {n: v.clone() for n, v in self._ema.model.state_dict().items()}

    @torch.no_grad()
    def check(self, loss: float) -> None:
        total = sum(value.sum() for value in self._ema.model.parameters())
        if math.isfinite(loss) and math.isfinite(total):
            self._keep()
            return
        self.times += 1
        self.factor /= 2
        print(f"loss {loss}: back to the last averaged weights, half the rate", flush=True)
        self._model.load_state_dict(self._good)
        self._ema.model.load_state_dict(self._good)
        for state in self._optimizer.state.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    value.zero_()


def train(args: argparse.Namespace) -> dict:
    """Train, write the averaged weights and a record; returns the record."""
    begun = time.monotonic()
    device = open_device(args.device, args.seed)
    splits, names = read_pack(args.data)
    if args.first:
        splits = {name: split.first(args.first) for name, split in splits.items()}
    size = tuple(args.size)
    model = ppyoloe_pale_nano(len(names)).to(device)
    source = start_backbone(model, args.backbone, args.wait)
    print(f"backbone: {source}", flush=True)
    optimizer = make_adamw(parameter_groups(model, args.weight_decay), device)
    views = Views(splits["train"], size, device, args.seed)
    looks = Looks()
    images, targets = views.draw(args.batch, looks)
    static = torch.ones((), dtype=torch.bool, device=device)
    model.train()
    head = model.yolo_head
    step = TrainingStep(
        model,
        optimizer,
        lambda network, *inputs: loss_of(network, *inputs, head),
        [images, targets.boxes, targets.classes, targets.real, static],
        clip_norm=CLIP_NORM,
        mode=args.mode,
    )
    ema = Ema(model)
    guard = Guard(model, optimizer, ema)
    left = max(1.0, min(args.seconds, args.deadline - (time.monotonic() - begun)))
    record = {
        "model": "ppyoloe_pale_nano",
        "initialised_from": source,
        "size": list(size),
        "batch": args.batch,
        "rate": args.rate,
        "weight_decay": args.weight_decay,
        "seed": args.seed,
        "looks": asdict(looks),
        "train_pictures": len(splits["train"].pictures),
        "val_pictures": len(splits["val"].pictures),
        "mode": step.mode,
        "before_training": round(time.monotonic() - begun, 1),
        "finished": False,
        "checks": [],
    }
    clock = Clock(left)

    def write(**more: object) -> None:
        given = round(time.monotonic() - begun, 1)  # with reading, waiting and scoring
        record.update(**more, **clock.facts(device), given_seconds=given)
        save_run(args.output, args.name, ema.model.state_dict(), record)

    def score(at: tuple[int, int]) -> dict[str, float]:
        return evaluate(ema.model, splits["val"], names, at)

    checks, noted, steps = list(CHECKS if args.checks else ()), 0.0, 0
    try:
        while not clock.ended:
            used = clock.used
            set_rate(optimizer, guard.factor * args.rate * cosine(used, warmup=0.05, end=0.01))
            static.fill_(used < STATIC_SHARE)
            plain = used >= 1 - PLAIN_SHARE
            images, targets = views.draw(args.batch, looks.without_mosaic() if plain else looks)
            loss = step(images, targets.boxes, targets.classes, targets.real, static)
            ema.update()
            steps += 1
            if used >= noted:
                noted += 0.02
                guard.check(loss.item())
                print(f"{clock.elapsed:7.1f} s  step {steps}  loss {loss:.4f}", flush=True)
            if checks and used >= checks[0]:
                checks.pop(0)
                found = score(size)
                print(f"{clock.elapsed:7.1f} s  step {steps}  {found}", flush=True)
                record["checks"].append({"share": round(used, 3), "step": steps, **found})
                write(steps=steps, restarts=guard.times)
        guard.check(loss.item())
    finally:  # whatever happens, what was learnt is kept
        write(steps=steps, restarts=guard.times)
    scores = {}
    for at in (size, *args.further_sizes):
        scores["x".join(map(str, at))] = score(at)
        write(scores=scores)
    write(finished=True)
    print(f"{args.name}: {scores}", flush=True)
    return record


def convert(weights: Path, target: Path) -> None:
    """Write weights of `train` under PaddleDetection's names, as safetensors or `.pdparams`."""
    arrays = to_paddle(torch.load(weights, map_location="cpu", weights_only=True))
    if target.suffix == ".pdparams":
        import paddle

        paddle.save({name: paddle.to_tensor(array) for name, array in arrays.items()}, str(target))
        return
    from ppvision.zoo.weights import save_weights

    save_weights(arrays, target)


def size_of(text: str) -> tuple[int, int]:
    """`256x320`: height and width, multiples of 32."""
    height, width = map(int, text.split("x"))
    if height % SIDE or width % SIDE:
        raise argparse.ArgumentTypeError(f"expected multiples of {SIDE}, got {text}")
    return height, width


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("pack", help="one file of pictures and boxes")
    verb.add_argument("--folder", type=Path, required=True, help="of `ppvision data bccd`")
    verb.add_argument("--data", type=Path, required=True, help="file to write")
    verb = verbs.add_parser("convert", help="weights for PaddleDetection")
    verb.add_argument("--weights", type=Path, required=True)
    verb.add_argument("--output", type=Path, required=True, help=".safetensors or .pdparams")
    verb = verbs.add_parser("train")
    verb.add_argument("--data", type=Path, required=True, help="file of `pack`")
    verb.add_argument("--output", type=Path, required=True, help="folder")
    verb.add_argument("--name", default="ppyoloe_pale_nano", help="of the files in it")
    verb.add_argument("--seconds", type=float, default=3600.0, help="of training, at most")
    verb.add_argument(
        "--deadline",
        type=float,
        default=3600.0,
        help="seconds after the start of this process at which training ends in any case",
    )
    verb.add_argument("--backbone", type=Path, help="state dict of a classifier to start from")
    verb.add_argument(
        "--wait",
        type=float,
        default=0.0,
        help="seconds for that file, until its record says finished",
    )
    verb.add_argument("--device", default="cuda")
    verb.add_argument("--mode", choices=MODES, default="graph")
    verb.add_argument("--size", type=size_of, default=(256, 320), help="HxW; that of the config")
    verb.add_argument("--further_sizes", type=size_of, nargs="*", default=[], help="scored as well")
    verb.add_argument("--batch", type=int, default=32)
    verb.add_argument("--rate", type=float, default=1e-3)
    verb.add_argument("--weight_decay", type=float, default=0.05)
    verb.add_argument("--seed", type=int, default=0)
    verb.add_argument("--first", type=int, help="pictures of each split, for a trial")
    verb.add_argument("--checks", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.verb == "pack":
        pack(args.folder, args.data)
    elif args.verb == "convert":
        convert(args.weights, args.output)
    else:
        train(args)


if __name__ == "__main__":
    main()
