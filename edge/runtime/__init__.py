"""On the device: numpy and onnxruntime, no torch."""
