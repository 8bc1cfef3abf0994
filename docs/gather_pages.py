"""The pages of the site, gathered in ``build/site_pages`` as they lie in the repository, so that their links hold.

``make site`` runs it. Besides what is copied there is a page for each public module, which mkdocstrings fills from the
docstrings, and the tour as a page.
"""

from __future__ import annotations

import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]

COPIED = ("*.md", "LICENSE", "docs/*.md", "docs/*.py", "examples/**/*", "benchmarks/*.md", "benchmarks/*.py")
RESULTS = ("benchmarks/results/*.md", "benchmarks/results/*.svg", "benchmarks/results/*.json")

MODULES = {
    "quant2e": "Quantize, step by step or in one call.",
    "quantizers": "Backend quantizers, and the kit to write one.",
    "lowering": "From a Q/DQ graph to a program.",
    "lowering.language_models": "Language models that generate.",
    "quant2e.integer": "The integer form of a graph.",
    "quant2e.accuracy.algorithms": "What mends accuracy.",
    "quant2e.pt2e": "Names that scripts written for PT2E import.",
    "quant2e.pytorch_quantization": "Descriptors and tensor functions of NVIDIA's pytorch-quantization.",
    "quant2e.signature_types": "Types of public signatures.",
    "quant2e.training": "What training needs.",
    "quant2e.weights": "Weights that stay in their files, for models larger than memory.",
    "quantizers.conformance": "A quantizer, checked on generated graphs.",
}
"""The public modules, each with a line for its page."""


def main(folder: Path) -> list[Path]:
    """Write all pages below ``folder``, which is emptied first; return them."""
    shutil.rmtree(folder, ignore_errors=True)
    for pattern in (*COPIED, *RESULTS):
        for file in sorted(ROOT.glob(pattern)):
            if file.is_file() and "__pycache__" not in file.parts:
                copy = folder / file.relative_to(ROOT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)
    tour = (ROOT / "docs" / "tour.py").read_text(encoding="utf-8")
    page = f"# A walk through the whole flow\n\n`docs/tour.py`, which runs as it stands:\n\n```python\n{tour}```\n"
    (folder / "docs" / "tour.md").write_text(page, encoding="utf-8")
    (folder / "reference").mkdir()
    for module, line in MODULES.items():
        text = f"# `{module}`\n\n{line}\n\n::: {module}\n"
        (folder / "reference" / f"{module}.md").write_text(text, encoding="utf-8")
    return sorted(folder.rglob("*.md"))


if __name__ == "__main__":
    print(f"{len(main(ROOT / 'build' / 'site_pages'))} pages")
