"""Export to Paddle Inference and ONNX, compared with eager mode inside, and prediction from it."""

from ppvision.deploy.export import export_model
from ppvision.deploy.parity import ParityError
from ppvision.deploy.predictor import Classification, Predictor

__all__ = ["Classification", "ParityError", "Predictor", "export_model"]
