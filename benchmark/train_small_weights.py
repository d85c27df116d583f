"""Train the zoo's small weights: `pale_nano` on single digits, then on digit scenes.

    python benchmark/train_small_weights.py --work_dir output/small_weights

Only the train split of digit-scenes is learned from. Stage 1 classifies single digits (56 px),
stage 2 segments scenes (112 px) under PaddleSeg's SegFormer head. A run that was stopped goes on
from its last save. At the end the weights are scored on the val split and written as the zoo keeps
them (`benchmark/zoo_weights.py`).
"""

import argparse
import os
import sys
import time
from pathlib import Path

from ppvision.environment import machine, prefer_fast_mkl

prefer_fast_mkl()  # before Paddle starts

import cv2
import numpy as np
import paddle
import paddle.nn.functional as F

from ppvision.data.convert.digit_scenes import write_digit_scenes
from ppvision.models.pale_transformer import VARIANTS, PaleTransformer
from ppvision.zoo.cards import WEIGHTS_FOLDER
from ppvision.zoo.weights import save_weights

sys.path.append(str(Path(__file__).resolve().parents[1]))
from benchmark.zoo_weights import write_zoo_weights

MEAN = STD = 0.5
DIGIT_SIDE, SCENE_SIDE, NUM_CLASSES = 56, 112, 11


def to_input(images: list[np.ndarray]) -> paddle.Tensor:
    batch = np.stack(images).astype(np.float32) / 255.0  # [B, H, W, 3]
    return paddle.to_tensor(((batch - MEAN) / STD).transpose(0, 3, 1, 2).copy())  # [B, 3, H, W]


def jitter(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Random contrast, brightness and channel gains."""
    gain = rng.uniform(0.7, 1.3) * rng.uniform(0.85, 1.15, 3)
    return (image * gain + rng.uniform(-30, 30)).clip(0, 255).astype(np.uint8)


def read_rgb(path: Path) -> np.ndarray:
    return cv2.imread(str(path))[:, :, ::-1]


def load_scenes(root: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    pairs = [line.split() for line in (root / f"{split}.txt").read_text().splitlines()]
    images = np.stack([read_rgb(root / image) for image, _ in pairs])
    labels = np.stack([cv2.imread(str(root / label), cv2.IMREAD_UNCHANGED) for _, label in pairs])
    return images, labels


def scene_batch(rng, images, labels, batch: int) -> tuple[list, np.ndarray]:
    """Random scale (0.8 to 1.25) and shift, jittered colours."""
    xs, ys = [], []
    for i in rng.integers(len(images), size=batch):
        scale = rng.uniform(0.8, 1.25)
        matrix = np.array([[scale, 0, 0], [0, scale, 0]])
        matrix[:, 2] = (1 - scale) * SCENE_SIDE * rng.uniform(0, 1, 2)
        size = (SCENE_SIDE, SCENE_SIDE)
        image = cv2.warpAffine(images[i], matrix, size, borderMode=cv2.BORDER_REFLECT)
        label = cv2.warpAffine(
            labels[i],
            matrix,
            size,
            flags=cv2.INTER_NEAREST,
            borderMode=cv2.BORDER_CONSTANT,
            borderValue=255,
        )
        xs.append(jitter(rng, image))
        ys.append(label)
    return xs, np.stack(ys).astype(np.int64)


def digit_batch(rng, crops, classes, batch: int) -> tuple[list, np.ndarray]:
    chosen = rng.integers(len(crops), size=batch)
    xs = []
    for i in chosen:
        side = int(rng.integers(44, DIGIT_SIDE + 12))
        image = cv2.resize(crops[i], (side, side))
        if side < DIGIT_SIDE:
            pad = DIGIT_SIDE - side
            image = cv2.copyMakeBorder(image, 0, pad, 0, pad, cv2.BORDER_REFLECT)
        top, left = (int(rng.integers(image.shape[k] - DIGIT_SIDE + 1)) for k in (0, 1))
        xs.append(jitter(rng, image[top : top + DIGIT_SIDE, left : left + DIGIT_SIDE]))
    return xs, classes[chosen]


def score(model, images, labels) -> np.ndarray:
    confusion = np.zeros((NUM_CLASSES, NUM_CLASSES), np.int64)
    model.eval()
    with paddle.no_grad():
        for start in range(0, len(images), 16):
            logits = model(to_input(list(images[start : start + 16])))[0]
            pred = logits.argmax(axis=1).numpy()
            pairs = labels[start : start + 16].astype(np.int64) * NUM_CLASSES + pred
            confusion += np.bincount(pairs.ravel(), minlength=NUM_CLASSES**2).reshape(
                confusion.shape
            )
    hit = np.diag(confusion)
    return hit / np.maximum(1, confusion.sum(0) + confusion.sum(1) - hit)


def run_stage(name, model, steps, rate, make_batch, loss_of, work_dir: Path, check) -> float:
    """Train `steps` steps, saving every 250; returns the hours spent, over all runs."""
    schedule = paddle.optimizer.lr.CosineAnnealingDecay(rate, steps, eta_min=rate * 0.01)
    warm = paddle.optimizer.lr.LinearWarmup(schedule, min(200, steps // 5), rate * 0.01, rate)
    optimizer = paddle.optimizer.AdamW(
        warm,
        parameters=model.parameters(),
        weight_decay=0.02,
        grad_clip=paddle.nn.ClipGradByGlobalNorm(1.0),
    )
    path, start, seconds = work_dir / f"{name}.pdparams", 0, 0.0
    if path.exists():
        saved = paddle.load(str(path))
        model.set_state_dict(saved["model"])
        optimizer.set_state_dict(saved["optimizer"])
        start, seconds = saved["step"], saved["seconds"]
    clock, losses = time.time(), []
    for step in range(start, steps):
        model.train()
        paddle.seed(step)
        rng = np.random.default_rng([*name.encode(), step])
        xs, ys = make_batch(rng)
        loss = loss_of(model(to_input(xs)), paddle.to_tensor(ys))
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        warm.step()
        losses.append(float(loss))
        if (step + 1) % 50 == 0:
            rate_now = (time.time() - clock) / (step + 1 - start)
            left = rate_now * (steps - step - 1) / 60
            print(
                f"{name} step {step + 1}/{steps} loss {np.mean(losses[-50:]):.4f} "
                f"{rate_now:.2f} s/step, {left:.0f} min left",
                flush=True,
            )
        if (step + 1) % 250 == 0 or step + 1 == steps:
            if (step + 1) % 1000 == 0 or step + 1 == steps:
                print(f"{name} step {step + 1}: {check(model)}", flush=True)
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step + 1,
                "seconds": seconds + time.time() - clock,
            }
            paddle.save(state, str(path) + ".new")
            os.replace(str(path) + ".new", path)
    return (seconds + time.time() - clock) / 3600


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work_dir", type=Path, default=Path("output/small_weights"))
    parser.add_argument("--output", type=Path, default=WEIGHTS_FOLDER)
    parser.add_argument("--scenes", type=int, default=6000)
    parser.add_argument("--digit_steps", type=int, default=900)
    parser.add_argument("--scene_steps", type=int, default=5500)
    parser.add_argument("--again_steps", type=int, default=2000)
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    root = args.work_dir / "digit-scenes"
    if not root.exists():
        write_digit_scenes(root, count=args.scenes, val_count=240, size=SCENE_SIDE, seed=1)

    paddle.seed(0)

    def crops_of(split):
        paths = sorted((root / "classes" / split).glob("*/*.jpg"))
        return [read_rgb(p) for p in paths], np.array([int(p.parent.name) for p in paths])

    train_crops, val_crops = crops_of("train"), crops_of("val")
    classifier = PaleTransformer(VARIANTS["pale_nano"], num_classes=10)

    def top1(model) -> float:
        model.eval()
        images = [cv2.resize(c, (DIGIT_SIDE, DIGIT_SIDE)) for c in val_crops[0]]
        with paddle.no_grad():
            out = [model(to_input(images[i : i + 64])).argmax(1) for i in range(0, len(images), 64)]
        return float((paddle.concat(out).numpy() == val_crops[1]).mean())

    hours = run_stage(
        "digits",
        classifier,
        args.digit_steps,
        1.5e-3,
        lambda rng: digit_batch(rng, *train_crops, 64),
        F.cross_entropy,
        args.work_dir,
        top1,
    )

    from paddleseg.models import SegFormer

    backbone = PaleTransformer(VARIANTS["pale_nano"], features_only=True)
    kept = {
        k: v for k, v in classifier.state_dict().items() if not k.startswith(("norm.", "head."))
    }
    backbone.set_state_dict(kept)
    model = SegFormer(NUM_CLASSES, backbone, embedding_dim=128)
    train, val = load_scenes(root, "train"), load_scenes(root, "val")
    for stage, steps, rate in (
        ("scenes", args.scene_steps, 1e-3),
        (
            "scenes again",
            args.again_steps,
            6e-4,
        ),  # a warm restart: the first pass had not converged
    ):
        hours += run_stage(
            stage,
            model,
            steps,
            rate,
            lambda rng: scene_batch(rng, *train, 8),
            lambda logits, y: F.cross_entropy(logits[0], y, ignore_index=255, axis=1),
            args.work_dir,
            lambda m: float(score(m, *val).mean()),
        )
    write_weights(args, root, model, score, val, top1(classifier), hours)


def write_weights(args, root: Path, model, score, val, digits_top1: float, hours: float) -> None:
    """Write the weights as the zoo keeps them: layers of bits, the graph, the card."""
    path = args.work_dir / "weights.safetensors"
    save_weights({k: v.numpy() for k, v in model.state_dict().items()}, path)
    facts = {
        "model": "pale_nano",
        "architecture": "segformer_pale_nano",
        "tag": "digit_scenes",
        "parts": "whole model: SegFormer head (embedding_dim 128, 11 classes) over the backbone",
        "data": "digit scenes, train split: 6,000 scenes of 112 px, seed 1, and their digits",
        "command": "python benchmark/train_small_weights.py",
        "hours": round(hours, 2),
        "machine": machine(),
        "score": "its own digit scenes val (240 scenes of 112 px, 11 classes), in float: mIoU "
        f"{score(model, *val).mean():.3f} (backbone's first stage: top-1 {digits_top1:.3f} on "
        "single digits)",
        "default": True,
        "aliases": ("pale_nano_digit_scenes",),
    }
    folder = write_zoo_weights(
        Path("configs/segmentation/segformer_pale_nano_digit_scenes.yml"),
        path,
        facts,
        bits=[8, 6, 4],
        side=SCENE_SIDE,
        options=[
            f"{split}_dataset.{key}"
            for split in ("train", "val")
            for key in (f"dataset_root={root}", f"{split}_path={root}/{split}.txt")
        ],
        output=args.output,
    )
    print(folder)


if __name__ == "__main__":
    main()
