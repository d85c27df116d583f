"""PS-Attention against Swin's shifted windows and CSWin's stripes, under one recipe, on CIFAR-10.

Only the grouping of tokens differs. Widths, depths, heads, query, key and value (separable
convolutions), position encoding (a depthwise convolution before the attention), MLP, padding and
its mask, initial values by seed, data and optimiser are the same:

    pale      half of the channels in groups of interlaced rows, half in interlaced columns
    windows   windows of 4 x 4, shifted by 2 in every second block of a stage (Swin, 2103.14030)
    stripes   half of the channels in stripes of 4 contiguous rows, half in columns
              (CSWin, 2107.00652; without LePE, since all share one position encoding)

The network is pale_nano (C = 32, six blocks) for 32 x 32 pictures: patch embedding of stride 2, so
that the stages see 16, 8, 4 and 2 tokens a side; pale, window and stripe size 4; depths 2, 2, 1, 1
instead of 1, 2, 2, 1, so that both stages where the three differ have a shifted block. On the maps
of the last two stages all three are attention among all tokens.

    python -m ppvision data cifar10 --source cifar10_jpeg.tar.gz --output data/cifar10
    python benchmark/attention_accuracy.py --data_root data/cifar10

writes benchmark/results/attention_cifar10.csv: one row per run as it ends, then mean and standard
deviation. Stopped, it goes on where it was. Started twice (with `OMP_NUM_THREADS=1`, a core each),
the two processes share the runs out. Top-1 is that of the last step, never the best of several.
"""

import argparse
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn
from tqdm import tqdm

from ppvision.engine.callbacks import ProgressLog
from ppvision.engine.run_folder import RunFolder
from ppvision.engine.trainer import Trainer, TrainOptions
from ppvision.environment import machine
from ppvision.models.pale_transformer import VARIANTS, PaleTransformer, PatchMerging
from ppvision.nn.pale_attention import MASKED_SCORE, SeparableConv, grouped_attention

sys.path.append(str(Path(__file__).resolve().parents[1]))
from benchmark.runs import add_row, claim_run, mean_and_spread, read_rows, record_time, spent

RESULTS = Path(__file__).with_name("results") / "attention_cifar10.csv"
ATTENTIONS = ("pale", "windows", "stripes")
FIELDS = ("attention", "seed", "top1", "loss", "epochs", "images", "minutes", "machine")
SIZE = 4  # rows of a pale, side of a window, width of a stripe
TRAIN_PER_CLASS, CLASSES, SIDE = 1000, 10, 32
BATCH, EPOCHS, RATE, WEIGHT_DECAY, WARMUP_EPOCHS = 64, 10, 1e-3, 0.05, 1
MEAN, STD = np.float32([125.3, 123.0, 113.9]), np.float32([63.0, 62.1, 66.7])  # of CIFAR-10


# -- three ways to group the tokens of a map ------------------------------------------------------


def rows_of(x: Tensor, interlaced: bool, size: int) -> Tensor:
    """Groups of `size` rows. `[B, C, H, W]` -> `[B*N, C, size*W]`."""
    batch, channels, height, width = x.shape
    count = height // size
    split = [batch, channels, *((size, count) if interlaced else (count, size)), width]
    order = [0, 3, 1, 2, 4] if interlaced else [0, 2, 1, 3, 4]
    return x.reshape(split).transpose(order).reshape([batch * count, channels, size * width])


def map_of_rows(groups: Tensor, interlaced: bool, height: int, width: int, size: int) -> Tensor:
    """The inverse of `rows_of`."""
    channels, count = groups.shape[1], height // size
    x = groups.reshape([-1, count, channels, size, width])  # [B, N, C, s, W]
    x = x.transpose([0, 2, 3, 1, 4] if interlaced else [0, 2, 1, 3, 4])
    return x.reshape([-1, channels, height, width])


def windows_of(x: Tensor, size: int) -> Tensor:
    """Windows of `size` x `size`. `[B, C, H, W]` -> `[B*windows, C, size*size]`."""
    batch, channels, height, width = x.shape
    x = x.reshape([batch, channels, height // size, size, width // size, size])
    return x.transpose([0, 2, 4, 1, 3, 5]).reshape([-1, channels, size * size])


def map_of_windows(groups: Tensor, height: int, width: int, size: int) -> Tensor:
    """The inverse of `windows_of`."""
    channels = groups.shape[1]
    x = groups.reshape([-1, height // size, width // size, channels, size, size])
    return x.transpose([0, 3, 1, 4, 2, 5]).reshape([-1, channels, height, width])


def shifted_mask(height: int, width: int, shift: int, size: int) -> Tensor:
    """Which tokens of a shifted window were no neighbours before the shift.

    Returns:
        `[windows, 1, T, T]`: 0 or a large negative number, for the attention scores.
    """
    region = paddle.zeros([1, 1, height, width])
    for axis, length in ((2, height), (3, width)):
        wrapped = (paddle.arange(length) >= length - shift).astype("float32")
        region += wrapped.reshape([-1, 1] if axis == 2 else [1, -1]) * (axis - 1)
    tokens = windows_of(region, size)[:, 0]  # [windows, T]: 0 to 3, the parts that met by the shift
    return (tokens.unsqueeze(1) != tokens.unsqueeze(2)).astype("float32").unsqueeze(1) * (
        MASKED_SCORE
    )


class GroupedAttention(nn.Layer):
    """Attention with one of the three groupings. Shapes: `[B, C, H, W]` -> the same.

    Args:
        channels: C.
        num_heads: an even number; pale and stripes give half of them to rows, half to columns.
        kind: of ATTENTIONS.
        shift: of the windows; 0 does not shift.
        size: rows of a pale, side of a window, width of a stripe.
    """

    def __init__(
        self, channels: int, num_heads: int, kind: str, shift: int = 0, size: int = SIZE
    ) -> None:
        super().__init__()
        self.query = SeparableConv(channels)
        self.key = SeparableConv(channels)
        self.value = SeparableConv(channels)
        self.project = nn.Conv2D(channels, channels, 1)
        self.num_heads = num_heads
        self.kind = kind
        self.shift = shift
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        below, right = -height % self.size, -width % self.size
        bias = None
        if below or right:
            real = F.pad(paddle.ones([1, 1, height, width]), [0, right, 0, below])
            bias = (1 - real) * MASKED_SCORE  # [1, 1, H', W']
            x = F.pad(x, [0, right, 0, below])
        parts = [self.query(x), self.key(x), self.value(x)]
        out = self._windows(parts, bias) if self.kind == "windows" else self._bands(parts, bias)
        return self.project(out[:, :, :height, :width] if below or right else out)

    def _windows(self, parts: list[Tensor], bias: Tensor | None) -> Tensor:
        batch, _, height, width = parts[0].shape
        size = self.size
        shift = self.shift if min(height, width) > size else 0  # one window: nothing to shift
        if shift:
            parts = [paddle.roll(t, [-shift, -shift], axis=[2, 3]) for t in parts]
        groups = [windows_of(t, size) for t in parts]
        if bias is not None:  # only a map of one window is padded
            bias = windows_of(bias, size).unsqueeze(1)  # [windows, 1, 1, T]
        elif shift:
            bias = shifted_mask(height, width, shift, size)  # [windows, 1, T, T]
        if bias is not None:
            bias = bias.tile([batch, 1, 1, 1])
        out = grouped_attention(*groups, self.num_heads, bias)
        out = map_of_windows(out, height, width, size)
        return paddle.roll(out, [shift, shift], axis=[2, 3]) if shift else out

    def _bands(self, parts: list[Tensor], bias: Tensor | None) -> Tensor:
        batch, channels, height, width = parts[0].shape
        interlaced, branches = self.kind == "pale", []
        split = [batch, 2, channels // 2, height, width]
        halves = zip(*(t.reshape(split).unbind(1) for t in parts), strict=True)
        for branch, cut in enumerate(halves):  # rows, then columns: the transposed map's rows
            cut = [*cut] if bias is None else [*cut, bias]
            if branch == 1:
                cut = [t.transpose([0, 1, 3, 2]) for t in cut]
            groups = [rows_of(t, interlaced, self.size) for t in cut]
            keys = None
            if bias is not None:
                keys = groups.pop().unsqueeze(1).tile([batch, 1, 1, 1])  # [B*N, 1, 1, T]
            out = grouped_attention(*groups, self.num_heads // 2, keys)
            sides = (height, width) if branch == 0 else (width, height)
            out = map_of_rows(out, interlaced, *sides, self.size)
            branches.append(out if branch == 0 else out.transpose([0, 1, 3, 2]))
        return paddle.concat(branches, axis=1)


def build(kind: str, seed: int) -> PaleTransformer:
    """The network of one run. The three kinds start from the same values for the same seed."""
    paddle.seed(seed)
    config = replace(VARIANTS["pale_nano"], depths=(2, 2, 1, 1))
    model = PaleTransformer(config, num_classes=CLASSES)
    embedding = PatchMerging(3, config.channels, 3, 2)
    nn.initializer.KaimingNormal()(embedding[0].weight)
    model.merges[0] = embedding
    for stage, blocks in enumerate(model.stages):
        for number, block in enumerate(blocks):
            attention = GroupedAttention(
                config.stage_channels[stage],
                config.num_heads[stage],
                kind,
                shift=SIZE // 2 if number % 2 else 0,
            )
            attention.set_state_dict(block.attention.state_dict())
            block.attention = attention
    return model


# -- data -----------------------------------------------------------------------------------------


def read_pictures(data_root: Path, cache: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Pictures `[N, 32, 32, 3]` uint8 and classes `[N]`: the first 1,000 of each class by file
    name for training, all for the test."""
    path = cache / f"{split}.npz"
    if not path.exists():
        images, labels = [], []
        folders = sorted((data_root / "classes" / split).iterdir())
        for number, folder in enumerate(folders):
            files = sorted(folder.iterdir())[: TRAIN_PER_CLASS if split == "train" else None]
            for file in tqdm(files, desc=f"{split} {folder.name}", disable=None):
                images.append(cv2.imread(str(file))[:, :, ::-1])
                labels.append(number)
        partial = path.with_name(f"{split}.{os.getpid()}.partial.npz")
        np.savez(partial, images=np.stack(images), labels=np.array(labels))
        partial.replace(path)
    with np.load(path) as arrays:
        return arrays["images"], arrays["labels"]


def to_input(images: np.ndarray) -> np.ndarray:
    """`[..., H, W, 3]` uint8 -> `[..., 3, H, W]` float32."""
    return np.ascontiguousarray(np.moveaxis((images - MEAN) / STD, -1, -3))


class Augmented(paddle.io.Dataset):
    """Random crop out of 4 pixels of padding, random flip: drawn from NumPy's global generator,
    which the engine seeds for every sample."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        super().__init__()
        self.images, self.labels = images, labels

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.int64]:
        top, left = np.random.randint(9, size=2)
        padded = np.pad(self.images[index], ((4, 4), (4, 4), (0, 0)))
        image = padded[top : top + SIDE, left : left + SIDE]
        if np.random.rand() < 0.5:
            image = image[:, ::-1]
        return to_input(image), np.int64(self.labels[index])

    def __len__(self) -> int:
        return len(self.images)


# -- runs -----------------------------------------------------------------------------------------


def losses(network: nn.Layer, batch: list[Tensor]) -> list[Tensor]:
    images, labels = batch
    targets = F.label_smooth(F.one_hot(labels, CLASSES), epsilon=0.1)
    return [F.cross_entropy(network(images), targets, soft_label=True)]


def evaluation(images: np.ndarray, labels: np.ndarray) -> Callable[[nn.Layer], dict[str, float]]:
    @paddle.no_grad()
    def evaluate(model: nn.Layer) -> dict[str, float]:
        model.eval()
        hits, loss = 0, 0.0
        for start in range(0, len(images), 200):
            logits = model(paddle.to_tensor(to_input(images[start : start + 200])))
            expected = paddle.to_tensor(labels[start : start + 200])
            hits += int((logits.argmax(axis=1) == expected).sum())
            loss += float(F.cross_entropy(logits, expected, reduction="sum"))
        return {"Evaluate/top1": hits / len(images), "Evaluate/loss": loss / len(images)}

    return evaluate


def run(kind: str, seed: int, epochs: int, data: dict, work_dir: Path) -> dict:
    """Train one network to the end; returns its row."""
    steps = epochs * (len(data["train"][0]) // BATCH)
    model = build(kind, seed)
    warm_up = steps // epochs * WARMUP_EPOCHS
    schedule = paddle.optimizer.lr.LinearWarmup(
        paddle.optimizer.lr.CosineAnnealingDecay(RATE, steps - warm_up), warm_up, 0.0, RATE
    )
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1 and not p.stop_gradient]
    optimizer = paddle.optimizer.AdamW(
        schedule,
        parameters=[
            {"params": decayed, "weight_decay": WEIGHT_DECAY},
            {"params": plain, "weight_decay": 0.0},
        ],
    )
    folder = RunFolder(work_dir / f"{kind}_{seed}")
    folder.open({"attention": kind, "seed": seed, "epochs": epochs})
    trainer = Trainer(
        model,
        optimizer,
        Augmented(*data["train"]),
        losses,
        None,
        folder,
        TrainOptions(
            iters=steps,
            batch_size=BATCH,
            log_iters=50,
            save_interval=100,
            keep_checkpoint_max=1,
            seed=seed,
            resume="auto",
        ),
    )
    trainer.callbacks.append(ProgressLog(steps, BATCH))
    with record_time(folder.root):
        trainer.fit()
    scores = evaluation(*data["val"])(model)
    return {
        "attention": kind,
        "seed": seed,
        "top1": f"{scores['Evaluate/top1']:.4f}",
        "loss": f"{scores['Evaluate/loss']:.4f}",
        "epochs": epochs,
        "images": len(data["train"][0]),
        "minutes": f"{spent(folder.root) / 60:.1f}",
        "machine": machine(),
    }


def summary(rows: list[dict]) -> list[dict]:
    """Mean and standard deviation (of the sample) over the seeds of each kind."""
    return mean_and_spread(rows, ("attention",), ("top1", "loss"))


def add_run(path: Path, row: dict) -> None:
    """Add a run to the table."""
    add_row(
        path,
        row,
        FIELDS,
        lambda r: (ATTENTIONS.index(r["attention"]), int(r["seed"])),
        summary,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_root", type=Path, required=True, help="made by `ppvision data`")
    parser.add_argument("--work_dir", type=Path, default=Path("output/attention_accuracy"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--attentions", nargs="+", default=ATTENTIONS, choices=ATTENTIONS)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger().setLevel(logging.INFO)  # some of Paddle's imports set it first
    args.work_dir.mkdir(parents=True, exist_ok=True)
    data = {
        split: read_pictures(args.data_root, args.work_dir, split) for split in ("train", "val")
    }
    for seed in args.seeds:
        for kind in args.attentions:
            with claim_run(args.work_dir / f"{kind}_{seed}.lock") as ours:
                done = {(row["attention"], int(row["seed"])) for row in read_rows(args.results)}
                if not ours or (kind, seed) in done:
                    continue
                logging.info(f"run: {kind}, seed {seed}")
                add_run(args.results, run(kind, seed, args.epochs, data, args.work_dir))
    print(args.results.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
