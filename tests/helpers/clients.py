"""Folders read as PaddleSeg's, PaddleDetection's and PaddleX's own programs read them: the same
files, keys and operations, written from their sources and without ppvision."""

from pathlib import Path

import cv2
import numpy as np
import yaml
from paddle import inference


def run_engine(program: Path, weights: Path, inputs: dict, *, memory: bool = True) -> list:
    """Outputs of Paddle Inference with the settings of the clients' `infer.py` on a CPU."""
    config = inference.Config(str(program), str(weights))
    config.disable_gpu()
    config.disable_glog_info()
    if memory:
        config.enable_memory_optim()
    engine = inference.create_predictor(config)
    for name in engine.get_input_names():
        handle = engine.get_input_handle(name)
        handle.reshape(inputs[name].shape)
        handle.copy_from_cpu(np.ascontiguousarray(inputs[name]))
    engine.run()
    return [engine.get_output_handle(n).copy_to_cpu() for n in engine.get_output_names()]


def run_paddleseg(folder: Path, picture: Path) -> np.ndarray:
    """Classes `[1, H, W]`, as `deploy/python/infer.py` of PaddleSeg gets them."""
    from paddleseg.deploy.infer import DeployConfig  # what that program itself reads with

    config = DeployConfig(str(folder / "deploy.yaml"))
    image = config.transforms({"img": str(picture)})["img"]
    (classes,) = run_engine(Path(config.model), Path(config.params), {"x": image[None]})
    return classes


def _read(picture: Path) -> np.ndarray:
    return cv2.cvtColor(cv2.imread(str(picture)), cv2.COLOR_BGR2RGB)


def run_paddledetection(folder: Path, picture: Path) -> list[np.ndarray]:
    """Rows of class, score and box, counts, and masks, as `deploy/python/infer.py` of
    PaddleDetection gets them. (Without a `model.pdmodel`: from `model.json`, without the memory
    optimisation.)"""
    content = yaml.safe_load((folder / "infer_cfg.yml").read_text())
    image = _read(picture)
    shape = np.array(image.shape[:2], np.float32)
    factor = np.ones(2, np.float32)
    for step in content["Preprocess"]:
        kind = step["type"]
        if kind == "Resize":
            (height, width), before = step["target_size"], image.shape[:2]
            scales = height / before[0], width / before[1]
            if step["keep_ratio"]:
                least = min(height, width) / min(before)
                if round(least * max(before)) > max(height, width):
                    least = max(height, width) / max(before)
                scales = least, least
            image = cv2.resize(
                image, None, None, fx=scales[1], fy=scales[0], interpolation=step["interp"]
            )
            shape, factor = (np.array(v, np.float32) for v in (image.shape[:2], scales))
        elif kind == "NormalizeImage":
            image = image.astype(np.float32) * (1 / 255 if step["is_scale"] else 1.0)
            if step["norm_type"] == "mean_std":
                image = (image - np.array(step["mean"])) / np.array(step["std"])
        elif kind == "Permute":
            image = image.transpose(2, 0, 1)
        elif kind == "PadStride" and step["stride"] > 0:
            pads = [(0, -n % step["stride"]) for n in image.shape[1:]]
            image = np.pad(image, [(0, 0), *pads])
    inputs = {"image": image[None], "im_shape": shape[None], "scale_factor": factor[None]}
    inputs = {name: array.astype(np.float32) for name, array in inputs.items()}
    earlier = (folder / "model.pdmodel").is_file()
    program = folder / ("model.pdmodel" if earlier else "model.json")
    return run_engine(program, folder / "model.pdiparams", inputs, memory=earlier)


def _normalized(image: np.ndarray, mean: list[float], std: list[float]) -> np.ndarray:
    planes = [
        image[..., k].astype(np.float32) * np.float32(1 / 255 / std[k])
        + np.float32(-mean[k] / std[k])
        for k in range(3)
    ]
    return np.stack(planes)


def _resized_by_paddlex(image: np.ndarray, size: list[int], interp: str) -> np.ndarray:
    flags = {"LINEAR": cv2.INTER_LINEAR, "BICUBIC": cv2.INTER_CUBIC, "NEAREST": cv2.INTER_NEAREST}
    return cv2.resize(image, size, interpolation=flags[interp])


def paddlex_input(content: dict, image: np.ndarray) -> np.ndarray:
    """What PaddleX gives the graph of a segmentation model or classifier.

    Args:
        content: of `inference.yml`.
        image: `[H, W, 3]` uint8, RGB.

    Returns:
        `[1, 3, H', W']` float32.
    """
    if "Deploy" in content:
        steps = {step["type"]: step for step in content["Deploy"]["transforms"]}
        if (resize := steps.get("Resize")) is not None:
            size = _resized_size(image, resize)
            image = _resized_by_paddlex(image, size, resize["interp"])
        return _normalized(image, steps["Normalize"]["mean"], steps["Normalize"]["std"])[None]
    for step in content["PreProcess"]["transform_ops"]:
        ((kind, options),) = step.items()
        if kind == "ResizeImage" and "resize_short" in options:
            scale = options["resize_short"] / min(image.shape[:2])
            size = [round(image.shape[1] * scale), round(image.shape[0] * scale)]
            image = _resized_by_paddlex(image, size, "LINEAR")
        elif kind == "ResizeImage":
            image = _resized_by_paddlex(
                image, options["size"], options.get("interpolation", "LINEAR")
            )
        elif kind == "CropImage":
            width, height = options["size"]
            top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
            image = image[top : top + height, left : left + width]
        elif kind == "NormalizeImage":
            image = _normalized(image, options["mean"], options["std"])
    return image[None]


def _resized_size(image: np.ndarray, options: dict) -> list[int]:
    """Width and height after a Resize of PaddleX."""
    size = options["target_size"]
    if options["keep_ratio"]:
        sides = image.shape[1], image.shape[0]
        scale = min(max(size) / max(sides), min(size) / min(sides))
        size = [round(n * scale) for n in sides]
    if divisor := options.get("size_divisor"):
        size = [-(-n // divisor) * divisor for n in size]
    return size


def paddlex_detector_inputs(content: dict, image: np.ndarray) -> dict[str, np.ndarray]:
    """What PaddleX gives the graph of a detector: `image` `[1, 3, H', W']`, `im_shape` and
    `scale_factor` `[1, 2]`, float32. Arguments as of `paddlex_input`."""
    shape, factors = image.shape[:2], (1.0, 1.0)
    for step in content["Preprocess"]:
        if step["type"] == "Resize":
            height, width = step["target_size"]
            size = _resized_size(image, {**step, "target_size": [width, height]})
            name = ["NEAREST", "LINEAR", "BICUBIC"][step["interp"]]
            before = image.shape
            image = _resized_by_paddlex(image, size, name)
            shape = image.shape[:2]
            factors = shape[0] / before[0], shape[1] / before[1]
        elif step["type"] == "NormalizeImage":
            scale = 1 if step["is_scale"] else 255
            std = [s / scale for s in step["std"]]
            mean = [m / scale for m in step["mean"]]
            image = _normalized(image, mean, std).transpose(1, 2, 0)
        elif step["type"] == "Permute":
            image = image.transpose(2, 0, 1)
        elif step["type"] == "PadStride" and step["stride"] > 0:
            pads = [(0, -n % step["stride"]) for n in image.shape[1:]]
            image = np.pad(image, [(0, 0), *pads])
    inputs = {"image": image, "im_shape": shape, "scale_factor": factors}
    return {name: np.array(value, np.float32)[None] for name, value in inputs.items()}


def run_paddlex(folder: Path, picture: Path) -> np.ndarray:
    """What `paddlex.create_model(...).predict` makes of a picture: classes `[H, W]` at the
    picture's size, or probabilities `[K]`."""
    content = yaml.safe_load((folder / "inference.yml").read_text())
    image = _read(picture)
    program, weights = folder / "inference.json", folder / "inference.pdiparams"
    (output,) = run_engine(program, weights, {"x": paddlex_input(content, image)}, memory=False)
    if "Deploy" not in content:
        return output[0]
    height, width = image.shape[:2]
    return cv2.resize(output[0], (width, height), interpolation=cv2.INTER_NEAREST)
