"""From a model in eager mode to a folder that Paddle Inference or ONNX Runtime runs."""
