"""A job at several widths: it wraps the job of any task."""

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import Tensor, nn

from ppvision.engine.trainer import ForwardPass
from ppvision.quant.packed import pack_model
from ppvision.quant.store.state import LayeredState, extract_state
from ppvision.quant.train.once_qat import OnceQAT
from ppvision.tasks.config import ConfigError
from ppvision.tasks.job import Job, unwrap_parallel
from ppvision.tasks.multibit.layered import has_quanters, is_layered
from ppvision.tasks.multibit.scores import score_by_width
from ppvision.tasks.multibit.slim_config import build_once_qat
from ppvision.tasks.multibit.training import draw_widths, make_passes
from ppvision.zoo.weights import assign_weights, read_weights

logger = logging.getLogger("ppvision")


class _Wrapped:
    """Delegate an attribute or a method to the wrapped job."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, job: "MultiBitJob | None", owner: type) -> Any:
        return self if job is None else getattr(job.float_job, self.name)


class MultiBitJob(Job):
    """A job whose model is trained, scored and exported at several widths.

    Everything that does not depend on widths is delegated to the wrapped job.

    Args:
        float_job: the task's job, in float.
        options: checked options of `slim_config`; {} means all defaults.

    Attributes:
        float_job, options: the arguments.
    """

    def __init__(self, float_job: Job, options: Mapping[str, Any]) -> None:
        super().__init__(float_job.name, allow_download=float_job.allow_download)
        self.float_job = float_job
        self.options = options
        self._once: OnceQAT | None = None

    # -- the model -----------------------------------------------------------------------------

    @property
    def model(self) -> OnceQAT:
        """Return the float model's layers with quanters, for training at all widths. It is the same
        object at every call, until other float weights are opened.

        Quanters compute their initial steps from the weights of the float model. So other float
        weights give another model and another optimiser.

        Raises:
            ConfigError: the options do not fit the model.
        """
        if self._once is None:
            self._once = self._quantised()
        return self._once

    def _quantised(self) -> OnceQAT:
        options = dict(self.options)
        if options.get("distillation") and not self.float_job.has_logits:
            raise ConfigError(
                "config: slim_config.distillation: a detector's losses are its own; expected 0."
            )
        fixed = {path: {"float": True} for path in self.float_job.constant_layers}
        options["layers"] = fixed | dict(options.get("layers", {}))
        return build_once_qat(_copy_of_layers(self.float_model), options, self.ends)

    @property
    def ends(self) -> Sequence[str]:
        """Return paths of the layers that read the image or give the result. They stay at 8
        bits."""
        from ppvision.plugins.paddleslim import end_layers

        found = end_layers(self.float_model, self.example)
        results = self.float_job.result_layers
        return found if results is None else [found[0], *results]

    # -- train ---------------------------------------------------------------------------------

    def make_optimizer(self, model: nn.Layer) -> paddle.optimizer.Optimizer:
        """Make the config's optimiser for all parameters of a once-QAT, including those of
        quanters."""
        return self.float_job.make_optimizer(model.model)

    def losses(self, network: nn.Layer, batch: object) -> list[Tensor]:
        """Return the losses of one forward pass at the current width, with the weight of the width,
        and its distillation from the highest width."""
        once = unwrap_parallel(network)
        outputs = self.forward(network, batch)
        losses = self.losses_of(once.model, outputs, batch)
        if not self.has_logits:
            return losses
        logits = outputs[0] if isinstance(outputs, (list, tuple)) else outputs
        return once.weigh(once.bits, list(losses), logits)

    def make_passes(self) -> dict[str, ForwardPass]:
        """Return one forward pass per width, so that memory contains one width at a time."""
        return make_passes(self.model, self.losses)

    def begin_step(self, seed: int, step: int) -> None:
        """Draw the widths of the step."""
        draw_widths(self.model, seed, step)

    # -- evaluate ------------------------------------------------------------------------------

    def scores(self, model: nn.Layer, *, num_workers: int = 0) -> dict[str, float]:
        """Return the scores of `evaluate` by tag at every width; see `score_by_width`."""
        return score_by_width(
            model, lambda at_width: self.float_job.scores(at_width, num_workers=num_workers)
        )

    def pictures(self, model: nn.Layer) -> dict[str, np.ndarray]:
        """Return the task's panels; a once-QAT is used at its highest width."""
        if isinstance(model, OnceQAT):
            model.set_bits(model.widths[0])
        return self.float_job.pictures(model)

    # -- open weights --------------------------------------------------------------------------

    def start_from(self, model_path: str | Path) -> None:
        """Give the model initial weights: those of a float model, from which quanters compute their
        initial steps, or those of a trained once-QAT.

        Raises:
            WeightsError: they do not fit.
        """
        arrays = read_weights(model_path)
        if has_quanters(arrays):
            assign_weights(self.model, arrays, str(model_path))
            return
        self._forget_model()
        self.float_job.start_from_arrays(arrays, model_path)

    def models(
        self, model_path: str | Path, bits: Sequence[int] | None = None
    ) -> Iterator[tuple[int, nn.Layer]]:
        """Like `Job.models`. It also accepts a checkpoint of once-QAT, and float weights, which are
        quantised without training."""
        if is_layered(model_path):
            yield from super().models(model_path, bits)
            return
        self._open(model_path)
        for k in bits or self.model.widths:
            self.model.set_bits(k)
            yield k, self.model

    def state(self, model_path: str | Path, bits: int | None = None) -> LayeredState:
        """Return the model split into layers of bits; arguments as in `load`."""
        if is_layered(model_path):
            return super().state(model_path, bits)
        self._open(model_path)
        return extract_state(self.model.model, self.model.widths)

    def load_float(self, model_path: str | Path) -> nn.Layer:
        state = self.state(model_path)
        return pack_model(self.structure(), state, state.held_bits, codes=False)

    def _open(self, model_path: str | Path) -> None:
        """Load weights of a file or of the zoo into the model."""
        arrays = read_weights(model_path)
        if has_quanters(arrays):
            assign_weights(self.model, arrays, str(model_path))
            return
        self._forget_model()
        self.float_job.load_arrays(arrays, model_path)
        logger.info(f"quantization: {model_path} is in float: quantised without any training")

    def _forget_model(self) -> None:
        """Discard the model before other float weights are loaded, because the steps of its
        quanters come from the earlier ones."""
        self._once = None
        self.__dict__.pop("optimizer", None)

    # -- the wrapped job's ---------------------------------------------------------------------

    task = _Wrapped()
    content = _Wrapped()
    evaluation_options = _Wrapped()
    score_tags = _Wrapped()
    has_logits = _Wrapped()
    batch_size = _Wrapped()
    iters = _Wrapped()
    class_names = _Wrapped()
    max_value = _Wrapped()
    architecture = _Wrapped()
    float_model = _Wrapped()
    example = _Wrapped()
    result_layers = _Wrapped()
    constant_layers = _Wrapped()
    fitting = _Wrapped()
    check_data = _Wrapped()
    train_dataset = _Wrapped()
    batched = _Wrapped()
    forward = _Wrapped()
    losses_of = _Wrapped()
    prepare_training = _Wrapped()
    evaluate = _Wrapped()
    evaluate_exported = _Wrapped()
    calibration_pictures = _Wrapped()
    predict_image = _Wrapped()
    writer = _Wrapped()
    predict_exported_to_folder = _Wrapped()
    export = _Wrapped()
    paddlex_name = _Wrapped()


def _copy_of_layers(model: nn.Layer) -> nn.Layer:
    """Copy a model's layers around the same tensors.

    So the float model does not change when quanters are put into the copy, the weights exist only
    once, and parameters keep their names, which an optimiser may use.
    """
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
