"""The zoo: models by name, their cards, and their weights."""

import ppvision.zoo.efficientnet_lite
import ppvision.zoo.pale
import ppvision.zoo.resnet  # noqa: F401  (registers)
from ppvision.zoo.factory import create_model
from ppvision.zoo.registry import list_models, model_card, register_model
from ppvision.zoo.weights import load_weights

__all__ = ["create_model", "list_models", "load_weights", "model_card", "register_model"]
