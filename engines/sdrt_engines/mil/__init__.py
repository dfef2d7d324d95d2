"""Core ML programs (MIL): written from ONNX graphs, read back from saved packages, and evaluated without a Mac.

``translate`` and ``operators`` write with coremltools' builder, which infers and checks every shape and type.
``package`` and ``evaluate`` read what lies on disk, with nothing of coremltools but its protobuf messages.
"""
