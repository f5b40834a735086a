"""The recipes that come with the toolkit: listed, and copied to be changed.

Invariant: reads no more than text, and never overwrites what it is not told to.
"""

import sysconfig
from dataclasses import dataclass
from pathlib import Path

from compressor.artifacts import atomic_write
from compressor.errors import RecipeError, ResourceError, did_you_mean


@dataclass(frozen=True)
class Shipped:
    """A recipe or study: its name, where it is, and its first sentence."""

    name: str
    path: Path
    purpose: str


def recipes_dir() -> Path:
    """Where the recipes are: in a checkout beside the package, else where an installed wheel puts them.

    Raises:
        ResourceError: They are not there.
    """
    installed = Path(sysconfig.get_path("data")) / "share" / "compressor" / "recipes"
    for folder in (Path(__file__).resolve().parent.parent / "recipes", installed):
        if (folder / "recipe.schema.json").is_file():
            return folder
    raise ResourceError(f"{installed}: the shipped recipes are not there; install the toolkit again")


def shipped() -> list[Shipped]:
    """All recipes and studies, by name; studies are `studies/NAME`."""
    root = recipes_dir()
    paths = [*sorted(root.glob("*.yaml")), *sorted((root / "studies").glob("*.yaml"))]
    return [
        Shipped(path.relative_to(root).with_suffix("").as_posix(), path, _purpose(path.read_text(encoding="utf-8")))
        for path in paths
    ]


def _purpose(text: str) -> str:
    """The first sentence of the comment at the top."""
    words: list[str] = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        told = line.lstrip("#").strip()
        if told.startswith("yaml-language-server"):
            continue
        if not told and words:
            break
        words += told.split()
    sentence = " ".join(words)
    return sentence.partition(". ")[0].rstrip(".") + "." if sentence else ""


def find_shipped(name: str) -> Shipped:
    """A recipe by its name, `.yaml` or not.

    Raises:
        RecipeError: There is none of that name.
    """
    known = {one.name: one for one in shipped()}
    plain = name.removesuffix(".yaml").removesuffix(".yml").removeprefix("recipes/")
    if plain not in known:
        near = did_you_mean(plain, known)
        raise RecipeError(f"'{name}' is no shipped recipe{near or '; compress.py ls lists them'}")
    return known[plain]


def adapted(one: Shipped, target: Path) -> str:
    """A shipped recipe's text for another place: what it refers to beside itself is named by its whole path."""
    text = one.path.read_text(encoding="utf-8")
    schema = recipes_dir() / ("study.schema.json" if one.name.startswith("studies/") else "recipe.schema.json")
    first, newline, rest = text.partition("\n")
    if first.startswith("# yaml-language-server:"):
        first = f"# yaml-language-server: $schema={schema}"
    lines = (first + newline + rest).splitlines(keepends=True)
    if one.name.startswith("studies/"):
        for i, line in enumerate(lines):
            key, colon, value = line.partition("recipe: ")
            if colon and value.strip().endswith(".yaml"):
                lines[i] = f"{key}recipe: {(one.path.parent / value.strip()).resolve()}\n"
    return "".join(lines).replace(f"recipes/{one.name}.yaml", str(target))


def new_recipe(text: str, target: Path, *, force: bool) -> Path:
    """Write a recipe where there is none yet.

    Raises:
        RecipeError: There is one, and `force` is not given; or the target is no YAML file.
    """
    if target.suffix not in (".yaml", ".yml"):
        raise RecipeError(f"{target}: a recipe's name ends in .yaml")
    if target.exists() and not force:
        raise RecipeError(f"{target}: it exists; choose another name or add --force")
    atomic_write(target, text)
    return target
