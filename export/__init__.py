"""Checkpoints to bundles: the models in PyTorch, their ONNX graphs, the tools that compare them (extra `export`)."""
