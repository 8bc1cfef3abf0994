"""XNNPACK in ExecuTorch: its legal form, its limits, and its partitioner."""
