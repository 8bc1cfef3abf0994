"""Peers beside ours: torchao, ExecuTorch, onnxruntime and OpenVINO, interleaved in each setting."""
