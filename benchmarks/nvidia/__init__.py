"""What sdrt does on an NVIDIA GPU, beside diffusers on the same one: ``python -m benchmarks.nvidia``."""
