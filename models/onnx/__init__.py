"""The bundled student without PyTorch: its graph, and ONNX Runtime to run it."""
