"""TensorRT and TensorRT-RTX, which share one Python API: parsing, plans, what a plan was built for, and sessions."""
