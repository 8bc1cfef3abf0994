"""quant2e: a quantization compiler for exported PyTorch graphs.

In: an ``nn.Module``, an ``ExportedProgram`` or a captured graph. Out: a Q/DQ graph that saves, loads and lowers.
"""
