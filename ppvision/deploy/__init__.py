"""Export to Paddle Inference and ONNX, compared with eager mode inside, and prediction from it."""

from typing import TYPE_CHECKING

from ppvision.deploy.run.predictor import Classification, Predictor
from ppvision.deploy.verify.parity import ParityError

if TYPE_CHECKING:
    from ppvision.deploy.write.export import export_model

__all__ = ["Classification", "ParityError", "Predictor", "export_model"]


def __getattr__(name: str) -> object:
    # Lazily: who only predicts loads no exporter.
    if name == "export_model":
        from ppvision.deploy.write.export import export_model

        return export_model
    raise AttributeError(f"module 'ppvision.deploy' has no attribute {name!r}")
