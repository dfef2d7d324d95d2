"""Export: torch checkpoint → ONNX bundle, always in float32."""
