"""Recipes: everything that was asked, as data and as a file. In: YAML or JSON, a quantizer. Out: a quantizer."""
