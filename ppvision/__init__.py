"""A PaddlePaddle model zoo: Pale Transformer, Semantic Diffusion Network, layered quantization."""

__version__ = "0.1.0"

_ZOO = ("create_model", "list_models", "load_weights", "model_card")

__all__ = [*_ZOO, "__version__"]


def __getattr__(name: str) -> object:
    # Lazily, so that `ppvision doctor` can speak on a machine where Paddle does not import.
    if name in _ZOO:
        import ppvision.zoo

        return getattr(ppvision.zoo, name)
    raise AttributeError(f"module 'ppvision' has no attribute {name!r}")
