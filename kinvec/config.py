"""YAML and `key=value` into typed settings: strict keys with a suggestion, one style of error."""

from __future__ import annotations

import difflib
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, ValidationError
from yaml import YAMLError

from kinvec.contracts import RecipeError, without_secrets

MOST_BYTES = 1 << 18  # of a YAML file: some seconds of parsing
MOST_VALUES, DEEPEST = 100_000, 50  # in it, aliases unfolded
MOST_DIGITS = 400  # of a number; in YAML one may be written to the base of 60
MOST_REFERENCES = 20  # `${…}` in a recipe: strings that name strings that name strings double each time


class Settings(BaseModel):
    """The base of every group of settings. The string under a field is its help."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True)


S = TypeVar("S", bound=Settings)


def load(model: type[S], *layers: Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> S:
    """Merge YAML files or mappings, later ones winning, then `key=value` overrides, and validate the whole.

    Raises `RecipeError`, naming the file or the override, when a file is no YAML, a key is unknown or a value is wrong.
    """
    merged: Any = OmegaConf.create({})
    for layer in layers:
        merged = _merge(merged, _read(layer) if isinstance(layer, Path) else OmegaConf.create(dict(layer)))
    merged = _merge(merged, _dotlist(overrides))
    values = _resolved(merged)
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise RecipeError("\n".join(_explain(model, e) for e in error.errors())) from None


def _resolved(merged: Any) -> Any:
    """The values, with what `${…}` refers to in its place.

    Raises `RecipeError` for references that lead nowhere, and for secrets: the values are written into the run folder.
    """
    if str(OmegaConf.to_container(merged)).count("${") > MOST_REFERENCES:
        raise RecipeError(
            f"recipe: it has more than {MOST_REFERENCES} references (${{…}}); write the values themselves"
        )
    try:
        values = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, RecursionError) as error:
        raise RecipeError(f"recipe: {_first_line(error)}") from None
    for key, value in leaves(values):
        if isinstance(value, str) and without_secrets(value) != value:
            what = "holds a password or a key, and would be kept in the run folder"
            raise RecipeError(f"recipe key '{key}' {what}; leave it in the environment")
    return values


def leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Every value within mappings and lists, with its keys joined by dots."""
    inner = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else None
    if inner is None:
        yield place, value
        return
    for key, own in inner:
        yield from leaves(own, f"{place}.{key}" if place else str(key))


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def parse_yaml(raw: bytes | str) -> Any:
    """The plain values of a YAML text. Raises `YAMLError` for what is none, names a type, or unfolds too far.

    An alias stands for a value without repeating it; a few lines of aliases of aliases stand for more than any memory.
    """
    text = raw.decode("utf-8") if isinstance(raw, bytes) else raw
    if len(text) > MOST_BYTES:
        raise YAMLError(f"longer than {MOST_BYTES >> 10} KiB")
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _unfolded(node, {})
        return loader.construct_document(node)
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RecursionError) as error:
        raise YAMLError(_first_line(error)) from None
    finally:
        loader.dispose()


def _unfolded(node: yaml.Node, sizes: dict[int, int], depth: int = 0) -> int:
    """How many values a node stands for, aliases unfolded. Raises `YAMLError` for too many, or too long a number."""
    if depth > DEEPEST:
        raise YAMLError(f"nested more than {DEEPEST} deep")
    if node.tag.endswith((":int", ":float")) and len(node.value) > MOST_DIGITS:
        raise YAMLError(f"a number of more than {MOST_DIGITS} digits")
    if id(node) not in sizes:
        sizes[id(node)] = MOST_VALUES  # while it is counted: one that holds itself has no end
        inner = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        parts = inner if isinstance(node, yaml.CollectionNode) else []
        sizes[id(node)] = 1 + sum(_unfolded(part, sizes, depth + 1) for part in parts)
    if sizes[id(node)] > MOST_VALUES:
        raise YAMLError(f"more than {MOST_VALUES:,} values, with its aliases unfolded")
    return sizes[id(node)]


def _merge(before: Any, after: Any) -> Any:
    try:
        return OmegaConf.merge(before, after)
    except TypeError:  # its message names no key
        keys = [str(key) for key in after if OmegaConf.is_list(after[key]) != OmegaConf.is_list(before.get(key))]
        raise RecipeError(
            f"recipe: {' or '.join(keys) or 'a key'} is a list in one place and a mapping in another; choose one"
        ) from None


def read_mapping(path: Path) -> dict[str, Any]:
    """A YAML file's mapping as it stands. Raises `RecipeError` where it is none."""
    found: Any = OmegaConf.to_container(_read(path))
    return found


def dump(settings: Settings) -> str:
    """The settings, fully resolved, as YAML that `load` reads back."""
    return OmegaConf.to_yaml(OmegaConf.create(settings.model_dump(mode="json")), resolve=True)


def merged(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """The values of both, those of `after` winning; mappings within are merged alike."""
    both = {**before, **after}
    for key in before.keys() & after.keys():
        if isinstance(before[key], Mapping) and isinstance(after[key], Mapping):
            both[key] = merged(before[key], after[key])
    return both


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Each leaf that differs, as `trainer.lr: 2e-05 → 3e-05`."""
    for key in dict.fromkeys([*old, *new]):
        a, b, name = old.get(key), new.get(key), f"{prefix}{key}"
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from differences(a, b, f"{name}.")
        elif a != b:
            yield f"{name}: {a} → {b}"


def fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, Any, str]]:
    """Every leaf key of the settings with its type, default and help; what the reference page is made from."""
    for name, field in model.model_fields.items():
        inner = group_of(field.annotation)
        if inner is not None:
            yield from fields(inner, f"{prefix}{inner_name(name, field.annotation)}.")
        else:
            kind = getattr(field.annotation, "__name__", None) if not get_args(field.annotation) else None
            yield (
                f"{prefix}{name}",
                kind or str(field.annotation).replace("typing.", ""),
                field.default,
                field.description or "",
            )


def group_of(annotation: Any) -> type[BaseModel] | None:
    """The group of settings behind a key: one, or several by name."""
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def inner_name(name: str, annotation: Any) -> str:
    """What a group's keys begin with: of several groups by name, `NAME` stands for each."""
    return f"{name}.NAME" if get_origin(annotation) is dict else name


def _read(path: Path) -> Any:
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(MOST_BYTES + 1)  # of a device it would have no end
        if not isinstance(parse_yaml(text), dict):
            raise RecipeError(f"{path}: a recipe is a mapping of keys to values, such as 'model: NAME'")
        node = OmegaConf.load(io.StringIO(text))
    except RecipeError:
        raise
    except FileNotFoundError:
        raise RecipeError(f"{path}: there is no such recipe file") from None
    except (YAMLError, OmegaConfBaseException, ValueError, TypeError, AttributeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or _first_line(error)
        raise RecipeError(f"{where}: not valid YAML ({problem})") from None
    return node


def _dotlist(overrides: Sequence[str]) -> Any:
    for item in overrides:
        if "=" not in item or item.startswith(("=", "-")):
            raise RecipeError(f"'{item}' is no setting; write key=value, for example trainer.epochs=3")
    try:
        for item in overrides:
            parse_yaml(item.partition("=")[2])
        return OmegaConf.from_dotlist(list(overrides))
    except (OmegaConfBaseException, YAMLError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise RecipeError(f"key=value: {_first_line(error)}") from None


def _explain(model: type[BaseModel], error: Mapping[str, Any]) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = [key for key, *_ in fields(model)] + list(_groups(model))
        near = difflib.get_close_matches(where, known, n=1, cutoff=0.4)
        return f"unknown recipe key '{where}'" + (f"; did you mean '{near[0]}'?" if near else "")
    value = "" if error["type"] == "missing" else f" (it is {error.get('input')!r})"
    message = error["msg"].removeprefix("Value error, ")
    return f"recipe key '{where}': {message[:1].lower()}{message[1:]}{value}"


def _groups(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        inner = group_of(field.annotation)
        if inner is not None:
            yield f"{prefix}{name}"
            yield from _groups(inner, f"{prefix}{name}.")
