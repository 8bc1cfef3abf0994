"""Integer forms of ATen ops, one family per file."""
