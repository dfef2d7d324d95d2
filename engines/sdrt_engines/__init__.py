"""Engines: ONNX → what a chip runs. One file an engine; ``build`` drives them."""
