"""Export to Paddle Inference and ONNX with a comparison to eager mode, and prediction from
exports."""

from typing import TYPE_CHECKING

from ppvision.deploy.run.detections import Detections
from ppvision.deploy.run.predictor import Predictor
from ppvision.deploy.run.task_table import Classification
from ppvision.deploy.run.transforms import register_transform

if TYPE_CHECKING:
    from ppvision.deploy.verify.parity import ParityError
    from ppvision.deploy.write.export import export_model

__all__ = [
    "Classification",
    "Detections",
    "ParityError",
    "Predictor",
    "export_model",
    "register_transform",
]

# A program that only predicts does not need these, so they are imported on request.
_LATER = {
    "ParityError": "ppvision.deploy.verify.parity",
    "export_model": "ppvision.deploy.write.export",
}


def __getattr__(name: str) -> object:
    if name in _LATER:
        import importlib

        return getattr(importlib.import_module(_LATER[name]), name)
    raise AttributeError(f"module 'ppvision.deploy' has no attribute {name!r}")
