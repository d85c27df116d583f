"""A PaddlePaddle model zoo: Pale Transformer, Semantic Diffusion Network, layered quantization."""

from typing import TYPE_CHECKING

from ppvision.moved import keep_earlier_names

if TYPE_CHECKING:
    from ppvision.deploy.run.predictor import Predictor
    from ppvision.deploy.write.export import export_model
    from ppvision.zoo import create_model, list_models, load_weights, model_card

__version__ = "0.1.0"

keep_earlier_names()

# Where each name of the Python face is.
_FACE = {
    "Predictor": "ppvision.deploy.run.predictor",
    "create_model": "ppvision.zoo",
    "export_model": "ppvision.deploy.write.export",
    "list_models": "ppvision.zoo",
    "load_weights": "ppvision.zoo",
    "model_card": "ppvision.zoo",
}

__all__ = [
    "Predictor",
    "__version__",
    "create_model",
    "export_model",
    "list_models",
    "load_weights",
    "model_card",
]


def __getattr__(name: str) -> object:
    # Lazily, so that `ppvision doctor` can speak on a machine where Paddle does not import, and a
    # server that predicts loads no exporter.
    if name in _FACE:
        import importlib

        return getattr(importlib.import_module(_FACE[name]), name)
    raise AttributeError(f"module 'ppvision' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
