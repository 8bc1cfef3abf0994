"""Storage: quantized models as ``.pt2`` files."""
