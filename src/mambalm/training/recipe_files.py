"""Recipes as files: found by name, built on one another, changed by `key=value`, refused with the nearest known key."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from mambalm.training.recipe import Recipe

_SHIPPED = files("mambalm.training") / "recipes"


def shipped() -> list[str]:
    """The names of the recipes that come with mambalm."""
    return sorted(path.name.removesuffix(".yaml") for path in _SHIPPED.iterdir() if path.name.endswith(".yaml"))


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a shipped recipe by its name, or one's own from a .yaml file.

    Args:
        name_or_path: a file ends in .yaml.
        overrides: such as ``schedule.peak=1e-3`` or ``stages.0.tokens=1G``; values are YAML, and a dotted path makes
            the sections on its way.

    Raises:
        ValueError: there is no such recipe, or it does not fit; every message names the key.
    """
    from pydantic import ValidationError

    from mambalm.training.recipe import Recipe

    values = _read(name_or_path, ())
    for override in overrides:
        _override(values, override)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        # A list whose items are refused is also told to be too short.
        found = [details for details in error.errors() if details["type"] != "too_short"] or error.errors()
        lines = [_line(details) for details in found]
        raise ValueError(f"recipe {name_or_path}: " + "; ".join(lines)) from error


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every default written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)


def _read(name_or_path: str, seen: tuple[str, ...]) -> dict[str, Any]:
    """The values of a recipe merged over those of its base."""
    if name_or_path in seen:
        raise ValueError(f"recipe {name_or_path} is its own base: {' -> '.join((*seen, name_or_path))}")
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ValueError(f"there is no recipe file {path}; shipped recipes are named without .yaml")
        text = path.read_text()
    elif name_or_path in shipped():
        text = (_SHIPPED / f"{name_or_path}.yaml").read_text()
    else:
        raise ValueError(f"there is no recipe {name_or_path!r}{_nearest(name_or_path, shipped())}")
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"recipe {name_or_path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"recipe {name_or_path} holds no keys: see a shipped one, such as mamba-tiny")
    base = values.pop("base", None)
    if base is None:
        return values
    # A base that is a file lies beside the recipe that names it.
    beside = path.parent / str(base)
    base = str(beside) if str(base).endswith(".yaml") else str(base)
    return _merge(_read(base, (*seen, name_or_path)), values)


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Sections are merged key by key, anything else (lists too) is replaced."""
    merged = dict(below)
    for key, value in above.items():
        known = merged.get(key)
        merged[key] = _merge(known, value) if isinstance(known, dict) and isinstance(value, dict) else value
    return merged


def _override(values: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ValueError(f"{override!r} is no override: write key=value, such as schedule.peak=1e-3")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{override!r}: the value is not YAML ({error})") from error
    where: Any = values
    *parents, last = path.split(".")
    for depth, key in enumerate(parents):
        step = _index(where, key, ".".join(parents[: depth + 1]))
        if isinstance(where, dict) and not isinstance(where.get(step), (dict, list)):
            where[step] = {}
        where = where[step]
    if not isinstance(where, (dict, list)):
        raise ValueError(f"{override!r}: {'.'.join(parents)} has no parts")
    where[_index(where, last, path)] = value


def _index(where: Any, key: str, path: str) -> Any:
    """A key of a section, or the number of an item of a list: by its place, or a stage's by its name."""
    if not isinstance(where, list):
        return key
    names = [item.get("name") if isinstance(item, dict) else None for item in where]
    if key in names:
        return names.index(key)
    if not key.isdigit() or int(key) >= len(where):
        known = [name for name in names if name] or [str(number) for number in range(len(where))]
        raise ValueError(f"{path}: there is no item {key!r}; choose {', '.join(known)}")
    return int(key)


def _line(details: Any) -> str:
    """One of pydantic's errors in our words."""
    path = [str(part) for part in details["loc"]]
    where = ".".join(path)
    if details["type"] == "extra_forbidden":
        return f"unknown key {where}{_nearest(path[-1], _known(path[:-1]))}"
    if details["type"] == "missing":
        return f"{where} is missing"
    message = details["msg"].removeprefix("Value error, ")
    return f"{where}: {message}, got {details['input']!r}" if where and details["type"] != "value_error" else message


def _known(path: Sequence[str]) -> list[str]:
    """The keys of the section at a path."""
    from mambalm.training.recipe import Recipe

    section: Any = Recipe
    for part in path:
        if part.isdigit():
            continue
        section = _section(section.model_fields[part].annotation)
    return list(section.model_fields)


def _section(annotation: Any) -> Any:
    """The section within an annotation such as `tuple[StageSection, ...] | None`."""
    if hasattr(annotation, "model_fields"):
        return annotation
    found = [_section(part) for part in getattr(annotation, "__args__", ())]
    return next((section for section in found if section is not None), None)


def _nearest(name: str, known: Iterable[str]) -> str:
    """A hint at what may have been meant."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; known are {', '.join(known)}"
