"""`pack`: write a trained model, or a float model without training, as a layered model."""

import logging
from functools import partial
from pathlib import Path

import numpy as np
from paddle import nn

from ppvision.console import ProgressLine
from ppvision.data.class_zip import ZipPath, read_sample
from ppvision.data.listing import list_images
from ppvision.deploy.write.integers import warn_of_one_shade
from ppvision.quant import OnceQAT, save_layered
from ppvision.quant.codes import MAX_BITS
from ppvision.quant.ptq.norm_statistics import estimate_statistics
from ppvision.quant.store.model import check_output
from ppvision.quant.train.layers import LayeredNorm
from ppvision.quant.train.quanters import LayeredActivationQuanterLayer
from ppvision.tasks.config import ConfigError
from ppvision.tasks.job import Job
from ppvision.tasks.multibit.job import MultiBitJob
from ppvision.tasks.multibit.layered import has_quanters
from ppvision.zoo.weights import read_weights

logger = logging.getLogger("ppvision")

CALIBRATION_PICTURES = 256  # largest number of images that are used


def pack_checkpoint(
    job: Job,
    model_path: str | Path,
    output: str | Path,
    *,
    ptq: bool = False,
    calibration: str | Path | None = None,
    activations: bool = False,
) -> Path:
    """Write a layered model.

    Args:
        job: job of the model. With `ptq` its slim_config may be missing: then all widths are made,
            for weights only.
        model_path: a checkpoint of once-QAT, or with `ptq` float weights.
        output: folder of the layered model.
        ptq: quantise float weights without training.
        calibration: images, as for `predict`, for the steps of activations and for BatchNorm's
            statistics at every width except the highest. Default None: the job's training images
            if activations are quantised; otherwise all widths use the float model's statistics.
        activations: with `ptq`: also quantise the inputs of layers, to 8 bits at every width,
            whatever slim_config says.

    Returns:
        The folder.

    Raises:
        ConfigError: `ptq` is missing for float weights or used for weights of once-QAT; or
            activations are quantised without `calibration`, and the task names no training images.
        FileExistsError: the folder contains other files than a layered model.
    """
    check_output(output)
    quanters = has_quanters(read_weights(model_path))
    if ptq and quanters:
        raise ConfigError(f"--ptq: expected float weights, got {model_path}, which has quanters.")
    if not ptq and not quanters:
        raise ConfigError(
            f"pack: expected a checkpoint of once-QAT, got {model_path} with float weights. Train "
            "with --slim_config, or quantise them as they are with --ptq."
        )
    if ptq and (activations or not isinstance(job, MultiBitJob)):
        inner, options = (job.float_job, job.options) if isinstance(job, MultiBitJob) else (job, {})
        job = MultiBitJob(inner, {**options, **({"activations": MAX_BITS} if activations else {})})
    job.load(model_path)
    once = job.model
    if ptq:
        _calibrate(job, once, calibration)
    return save_layered(once, output, bits=once.widths, config=job.architecture)


# -- calibration -----------------------------------------------------------------------------------


def _calibrate(job: Job, once: OnceQAT, pictures: str | Path | None) -> None:
    activations = [q for q in once.sublayers() if isinstance(q, LayeredActivationQuanterLayer)]
    chosen: list[Path | ZipPath]
    if pictures is not None:
        chosen = [path for path, _ in list_images(pictures, "--calibration")]
    elif activations:
        chosen, pictures = list(job.calibration_pictures()), "the training set"
    else:
        return
    places = np.linspace(0, len(chosen) - 1, min(len(chosen), CALIBRATION_PICTURES)).astype(int)
    chosen = [chosen[place] for place in places]
    logger.info(f"calibration: {len(chosen)} images of {pictures}")
    once.set_bits(once.widths[0])
    for quanter in activations:
        quanter.calibrating = True
    if activations:
        with ProgressLine("activations", len(chosen)) as bar:
            shaded = [_show(job, once, path, bar) for path in chosen]
        if not any(shaded):
            warn_of_one_shade()
    _set_activations(once)
    norms = [norm for norm in once.sublayers() if isinstance(norm, LayeredNorm)]
    if not norms:
        return
    for k in once.widths[1:]:
        once.set_bits(k)
        with ProgressLine(f"statistics at {k} bits", len(chosen)) as bar:
            estimate_statistics(norms, [partial(_show, job, once, path, bar) for path in chosen])
    once.set_bits(once.widths[0])


def _set_activations(once: OnceQAT) -> None:
    for path, layer in once.model.named_sublayers():
        quanter = getattr(layer, "activation_quanter", None)
        if not isinstance(quanter, LayeredActivationQuanterLayer):
            continue
        if quanter.saw_nothing:  # for example an auxiliary head
            logger.info(f"calibration: {path} does not run in prediction; its input is not rounded")
            layer.activation_quanter = None
        else:
            quanter.finish_calibration()


def _show(job: Job, model: nn.Layer, path: Path | ZipPath, bar: ProgressLine) -> bool:
    """Return whether the image has more than one shade."""
    picture = read_sample(path, max_value=job.max_value)
    job.predict_image(model, picture)
    bar.update()
    return bool(np.ptp(picture, axis=(0, 1)).any())
