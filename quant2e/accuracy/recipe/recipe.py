"""Recipe: everything that was asked of a quantization, as data and as a file; it drives any quantizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch.export import ExportedProgram
from torch.fx import GraphModule

from quant2e.accuracy.algorithms.registry import read_algorithms
from quant2e.accuracy.recipe.differences import recipe_difference
from quant2e.accuracy.recipe.quantizer import RecipeQuantizer
from quant2e.accuracy.recipe.reading import Places, plain_settings, read, schema_of
from quant2e.accuracy.recipe.settings import OpSettings, RecipeRule, TensorRule
from quant2e.annotation.quantizer import Quantizer
from quant2e.documents.json_text import read_json
from quant2e.documents.yaml_text import LARGEST, read_yaml_lines, yaml_text
from quant2e.errors import FileFormatError, Quant2eError
from quant2e.files import atomic_file
from quant2e.prepare.prepare import prepare_pt2e

FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything that was asked, whatever the quantizer.

    ``recipe``: the format, 1. ``description``: for readers. ``imports``: other recipes, by paths relative to the file;
    `from_file` puts what they say in front. ``default``: what is asked of all ops. ``rules``: of those that they name,
    in order: each wins over those in front of it, in what it says; ``use`` says everything anew. ``tensors``: numbers
    of single tensors, over all rules. ``algorithms``: what mends accuracy, as ``quantize(algorithms=)`` takes it.

    ``print(recipe)`` is its YAML. Raises `Quant2eError` for algorithms that there are not.
    """

    recipe: int = FORMAT
    description: str = ""
    imports: tuple[str, ...] = ()
    default: OpSettings | None = None
    rules: tuple[RecipeRule, ...] = ()
    tensors: tuple[TensorRule, ...] = ()
    algorithms: Any = field(default=())

    def __post_init__(self) -> None:
        if self.recipe != FORMAT:
            raise FileFormatError(f"a recipe of format {self.recipe}; this version reads format {FORMAT}")
        object.__setattr__(self, "algorithms", _listed(self.algorithms))
        if self.algorithms != "auto":
            read_algorithms(self.algorithms)

    @classmethod
    def named(cls, name: str) -> Recipe:
        """The recipe of a scheme: ``w8a8``, ``w8a8-dynamic``, ``w8``, ``w4-g32`` … for all ops.

        Raises `AnnotationError` for a name that is none.
        """
        return cls(default=OpSettings(use=name))

    @classmethod
    def from_dict(cls, data: Any, source: str = "the recipe") -> Recipe:
        """The recipe that plain data describes; ``imports`` are left as they are.

        Raises `FileFormatError`, with the place and the nearest name, for what does not fit.
        """
        return _read(data, Places(source))

    @classmethod
    def from_file(cls, path: str | Path) -> Recipe:
        """Read YAML, or JSON from ``.json``, with what it imports in front.

        Of two files the rules of the importing one come later, and win; its ``default`` and its ``algorithms`` replace
        those of what it imports. Raises `FileFormatError`, with file, line and keys, for what does not fit, a key that
        stands twice, NaN, and files that import each other in a circle.
        """
        return _from_file(Path(path), ())

    def to_file(self, path: str | Path) -> None:
        """Write YAML, or JSON to ``.json``; an existing file is replaced only once the new one is complete."""
        text = json.dumps(self.as_dict(), indent=1) + "\n" if Path(path).suffix == ".json" else str(self)
        with atomic_file(Path(path)) as part:
            part.write_text(text, encoding="utf-8")

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for YAML or JSON; `from_dict` is its inverse."""
        data: dict[str, Any] = plain_settings(self)
        return {"recipe": FORMAT, **data}

    def __str__(self) -> str:
        return yaml_text(self.as_dict())

    @staticmethod
    def schema() -> dict[str, Any]:
        """JSON Schema of recipes, for editors."""
        made = schema_of(Recipe)
        items = {"anyOf": [{"type": "string"}, {"type": "object", "maxProperties": 1, "minProperties": 1}]}
        algorithms = {"anyOf": [{"const": "auto"}, {"type": "array", "items": items}]}
        made["properties"] |= {"algorithms": algorithms, "recipe": {"const": FORMAT}}
        return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "quant2e recipe", **made}

    def apply(self, quantizer: Quantizer) -> Quantizer:
        """A quantizer that asks what this recipe asks, of ``quantizer``'s backend; that one is left as it is.

        What the backend cannot honour is in the notes of the report, and in `unmet` before anything runs. Imports are
        to be read by `from_file`. Raises `Quant2eError` for a recipe that still has some.
        """
        return self._applied(quantizer)

    def _applied(self, quantizer: Quantizer) -> RecipeQuantizer:
        if self.imports:
            raise Quant2eError(f"this recipe imports {self.imports[0]!r}: read it with Recipe.from_file, which does so")
        return RecipeQuantizer(quantizer, self.default, self.rules, self.tensors)

    def unmet(self, model: GraphModule | ExportedProgram, quantizer: Quantizer) -> list[str]:
        """What ``quantizer`` cannot honour of this recipe on a captured ``model``, a line each; nothing is calibrated.

        Raises `AnnotationError` for rules that name nothing in the model.
        """
        applied = self._applied(quantizer)
        prepare_pt2e(model, applied)
        return list(applied.unmet)

    def diff(self, other: Recipe) -> str:
        """What ``other`` changes, as a review: rules removed, added, changed, with old and new values."""
        return recipe_difference(self.as_dict(), other.as_dict())


def _listed(algorithms: Any) -> Any:
    return tuple(algorithms) if isinstance(algorithms, list) else algorithms


def _read(data: Any, places: Places) -> Recipe:
    made: Recipe = read(Recipe, data, places)
    if "recipe" not in data:
        raise places.error((), f"has no 'recipe', which says its format: recipe: {FORMAT}")
    seen: dict[str, int] = {}
    for index, rule in enumerate(made.tensors):
        if rule.tensor in seen:
            raise places.error(
                ("tensors", index), f"is about '{rule.tensor}', and so is tensors[{seen[rule.tensor]}]: make them one"
            )
        seen[rule.tensor] = index
    return made


def _from_file(path: Path, importing: tuple[Path, ...]) -> Recipe:
    here = path.resolve()
    if here in importing:
        chain = " imports ".join(str(file) for file in (*importing[importing.index(here) :], here))
        raise FileFormatError(f"recipes import each other in a circle: {chain}")
    data, places = _document(path)
    own = _read(data, places)
    made = Recipe()
    for index, name in enumerate(own.imports):
        if Path(name).is_absolute() or "://" in name:
            raise places.error(("imports", index), f"is {name!r}, and must be a path relative to this file")
        if not (path.parent / name).is_file():
            raise places.error(("imports", index), f"there is no file {path.parent / name}")
        made = _over(_from_file(path.parent / name, (*importing, here)), made)
    return _over(own, made)


def _document(path: Path) -> tuple[Any, Places]:
    """The data of a file, and where its parts are."""
    if not path.is_file():
        raise FileFormatError(f"{path} does not exist, or is not a file")
    if path.stat().st_size > LARGEST:
        raise FileFormatError(f"{path} has {path.stat().st_size:,} bytes; a recipe has {LARGEST:,} at most")
    raw = path.read_bytes()
    if path.suffix == ".json":
        return read_json(raw, str(path)), Places(str(path))
    try:
        data, lines = read_yaml_lines(raw.decode("utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise FileFormatError(f"{path} is not text in UTF-8: {error}") from error
    return data, Places(str(path), lines)


def _over(own: Recipe, base: Recipe) -> Recipe:
    """One recipe behind another one, over which it wins."""
    return replace(
        own,
        imports=(),
        description=own.description or base.description,
        default=own.default or base.default,
        rules=(*base.rules, *own.rules),
        tensors=(*base.tensors, *own.tensors),
        algorithms=own.algorithms or base.algorithms,
    )


def recipe_of(asked: Any) -> Recipe:
    """A recipe, given as itself, as plain data, as a file, or as the name of a scheme.

    Raises `Quant2eError` for anything else.
    """
    if isinstance(asked, Recipe):
        return asked
    if isinstance(asked, Mapping):
        return Recipe.from_dict(asked)
    if isinstance(asked, Path) or (isinstance(asked, str) and Path(asked).suffix in (".yaml", ".yml", ".json")):
        return Recipe.from_file(asked)
    if isinstance(asked, str):
        return Recipe.named(asked)
    raise Quant2eError(f"recipe is a {type(asked).__name__}: give a Recipe, a file, or a name such as 'w8a8'")
