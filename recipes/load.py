"""YAML and `key=value` overrides -> `Recipe`; and a recipe's dictionary and hash.

Layers, later ones win:  parent of `extends` (recursively)  <  the file  <  overrides.  Each layer is checked by itself
before it is merged, so that an error names the file, the dotted key and the nearest right one. Where a layer names a base that
has defaults of its own, `_on-<base>.yaml`, they come right below that layer: what was tuned for another base gives way.
"""

import dataclasses
import difflib
import hashlib
import json
import os
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from loragraft.recipes.schema import Recipe, RecipeError

__all__ = ["RecipeError", "list_recipes", "load_recipe", "recipe_hash", "recipe_to_dict"]

_SHIPPED = Path(__file__).parent
_PARENT = "_base"
"""What a recipe of one's own extends; not a recipe by itself."""
_PATHS = {"data": ("folder", "dataset"), "weights": ("path", "encoders")}
"""Keys that hold a path, or may, by block."""


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-3 as a number (YAML 1.2; PyYAML follows 1.1) and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key_node.value!r} is given twice", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def list_recipes() -> list[str]:
    """Names of the recipes that ship with the package, sorted; files that start with `_` are only parents."""
    return sorted(path.stem for path in _SHIPPED.glob("*.yaml") if not path.stem.startswith("_"))


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe by name (`marketing`) or by path (`./mine.yaml`) and apply overrides such as `train.steps=500`.

    Values of overrides are YAML: `optim.betas=[0.9, 0.95]`, `data.domain=null`.
    Raises RecipeError: unknown recipe, unknown key, wrong type, value out of range, cycle of `extends`, bad YAML.
    """
    path = _locate(str(name_or_path), relative_to=Path.cwd())
    merged, origins = _load_layer(path, chain=())
    layers = {override: _parse_override(override) for override in overrides}
    for layer in layers.values():
        _merge_base_defaults(merged, layer, origins)
    for override, layer in layers.items():
        _merge(merged, layer, origins, _of_override(override))
    merged.setdefault("name", path.stem)
    try:
        return _build(merged)
    except RecipeError as error:
        raise RecipeError(f"{_blamed(error.keys, origins, overrides) or path}: {error}", *error.keys) from None


def recipe_to_dict(recipe: Recipe, *, public: bool = False) -> dict[str, Any]:
    """The resolved recipe as plain JSON types. With `public`, a folder, a data set or weights on disk are the name without
    the path to it, and `publish.to` is left out: fit for files that leave this machine."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(recipe)))
    if public:
        for block, keys in _PATHS.items():
            for key in keys:
                value = plain[block][key]
                if value is not None and Path(value).is_absolute():
                    plain[block][key] = Path(value).name
        del plain["publish"]
    return plain


def recipe_hash(recipe: Recipe) -> str:
    """sha256 (hex) of the public dictionary as canonical JSON: the same on every machine, whatever its paths."""
    canonical = json.dumps(recipe_to_dict(recipe, public=True), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _locate(name: str, relative_to: Path) -> Path:
    """The file of a recipe's name or path. A name has no separator and no suffix."""
    if "/" not in name and not name.endswith((".yaml", ".yml")):
        shipped = _SHIPPED / f"{name}.yaml"
        if shipped.is_file():
            return shipped
        known = list_recipes()
        raise RecipeError(
            f"unknown recipe {name!r}{_nearest(name, [*known, _PARENT]) or '.'} Shipped: {', '.join(known)}. "
            f"A file of your own is given by path: ./{name}.yaml"
        )
    path = Path(relative_to, Path(name).expanduser()).resolve()
    if not path.is_file():
        if path.is_dir():
            raise RecipeError(f"{path} is a folder: give the recipe's file in it")
        if "/" not in name and (_SHIPPED / path.name).is_file():
            raise RecipeError(
                f"no recipe file {path}; did you mean {path.stem}? What is shipped has a name, not a path"
            )
        siblings = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise RecipeError(f"no recipe file {path}{_nearest(path.name, siblings)}")
    return path


def _load_layer(path: Path, chain: tuple[Path, ...]) -> tuple[dict[str, Any], dict[str, str]]:
    """The file merged over its parents, and for every dotted leaf key the file that set it, the last set last."""
    if path in chain:
        cycle = " -> ".join(p.name for p in (*chain[chain.index(path) :], path))
        raise RecipeError(f"{path}: `extends` runs in a circle: {cycle}")
    layer = _parse(_read(path), str(path))
    parent = layer.pop("extends", None)
    if parent is not None and not isinstance(parent, str):
        raise RecipeError(f"{path}: extends must be one recipe's name or path, not {parent!r}")
    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}
    if parent is not None:
        try:
            parent_path = _locate(parent, relative_to=path.parent)
        except RecipeError as error:
            raise RecipeError(f"{path}: extends: {error}") from None
        merged, origins = _load_layer(parent_path, (*chain, path))
        merged.pop("name", None)  # a child that gives no name is called after its own file
    _resolve_paths(layer, path.parent)
    _merge_base_defaults(merged, layer, origins)
    _merge(merged, layer, origins, str(path))
    return merged, origins


def _merge_base_defaults(target: dict[str, Any], layer: Mapping[str, Any], origins: dict[str, str]) -> None:
    """Lay the defaults of the base that `layer` names, if it names one that has any, over `target`."""
    file = _SHIPPED / f"_on-{str(layer.get('base')).replace('_', '-')}.yaml"
    if file.is_file():
        _merge(target, _parse(file.read_text(encoding="utf-8"), str(file)), origins, str(file))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from error


def _parse(text: str, origin: str) -> dict[str, Any]:
    try:
        parsed = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{origin}: not valid YAML: {error}") from error
    if parsed is None:
        return {}
    if not isinstance(parsed, dict):
        raise RecipeError(f"{origin}: a recipe is a mapping of keys to values, not {_describe(parsed)}")
    return parsed


def _parse_override(override: str) -> dict[str, Any]:
    """`a.b=value` -> {a: {b: value}}."""
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        spaces = "" if equals else "; a value with spaces in it stands in quotes"
        raise RecipeError(f"override {override!r} is not of the form key=value, such as train.steps=500{spaces}")
    try:
        value = yaml.load(text, Loader=_Loader) if text.strip() else ""
    except yaml.YAMLError as error:
        hint = " (a text that begins with a brace or a bracket stands in quotes)" if text.lstrip()[:1] in "{[" else ""
        raise RecipeError(f"override {override!r}: the value is not valid YAML{hint}: {error}") from error
    layer: Any = value
    for part in reversed(parts):
        layer = {part: layer}
    _resolve_paths(layer, Path.cwd())
    return typing.cast(dict[str, Any], layer)


def _resolve_paths(layer: dict[str, Any], start: Path) -> None:
    """Make what lies on disk absolute while it is still known where it was written."""
    for name, keys in _PATHS.items():
        block = layer.get(name)
        for key in keys:
            value = block.get(key) if isinstance(block, dict) else None
            if isinstance(block, dict) and isinstance(value, str) and value:
                path = Path(os.path.abspath(start / Path(value).expanduser()))  # a link keeps its name, and its suffix
                if key == "folder" or value.startswith((".", "/", "~")) or path.exists():
                    block[key] = str(path)


def _merge(target: dict[str, Any], layer: Mapping[str, Any], origins: dict[str, str], origin: str) -> None:
    """Check `layer` against the schema and lay it over `target`; blocks merge key by key, lists are replaced."""
    for dotted, value in _checked_leaves(Recipe, layer, "", origin):
        *blocks, leaf = dotted.split(".")
        inner = target
        for block in blocks:
            inner = inner.setdefault(block, {})
        inner[leaf] = value
        origins.pop(dotted, None)  # the last set stands last
        origins[dotted] = origin


def _checked_leaves(cls: type, layer: Mapping[str, Any], prefix: str, origin: str) -> Iterator[tuple[str, Any]]:
    """Every (dotted key, converted value) of a layer. Raises RecipeError on an unknown key or a wrong type."""
    hints = typing.get_type_hints(cls)
    for key, value in layer.items():
        dotted = f"{prefix}{key}"
        if key not in hints:
            raise RecipeError(f"{origin}: unknown key {dotted!r}{_suggest_key(str(key), prefix, hints)}", dotted)
        if dataclasses.is_dataclass(hints[key]):
            if value is None:
                continue  # `train:` with nothing under it
            if not isinstance(value, dict):
                inner = ", ".join(typing.get_type_hints(hints[key]))
                raise RecipeError(f"{origin}: {dotted} is a block of keys ({inner}), not {_describe(value)}", dotted)
            yield from _checked_leaves(typing.cast(type, hints[key]), value, f"{dotted}.", origin)
        else:
            yield dotted, _convert(hints[key], value, dotted, origin)


def _suggest_key(key: str, prefix: str, hints: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(key, hints, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {prefix}{near[0]!s}?"
    elsewhere = [dotted for dotted in _all_keys(Recipe, "") if dotted.rpartition(".")[2] == key]
    if elsewhere:
        return f"; did you mean {' or '.join(elsewhere)}?"
    return f"; {prefix.rstrip('.') or 'a recipe'} has {', '.join(hints)}"


def _all_keys(cls: type, prefix: str) -> Iterator[str]:
    for key, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            yield from _all_keys(typing.cast(type, hint), f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _convert(hint: Any, value: Any, key: str, origin: str) -> Any:
    """`value` as the type that the schema asks for. Lists become tuples and integers floats; nothing else changes."""
    if isinstance(hint, types.UnionType):  # X | None
        if value is None:
            return None
        hint = next(option for option in typing.get_args(hint) if option is not type(None))
    form = typing.get_origin(hint)
    if form is Literal:
        choices = typing.get_args(hint)
        if value not in choices or isinstance(value, bool):
            listed = ", ".join(map(str, choices))
            hint_text = _nearest(str(value), choices)
            raise RecipeError(f"{origin}: {key} must be one of {listed}, not {value!r}{hint_text}", key)
        return value
    if form is tuple:
        parts = typing.get_args(hint)
        wanted = len(value) if isinstance(value, list) and parts[-1] is Ellipsis else len(parts)
        if not isinstance(value, list) or len(value) != wanted:
            size = "a list" if parts[-1] is Ellipsis else f"a list of {wanted} items"
            raise RecipeError(f"{origin}: {key} must be {size}, not {_describe(value)}", key)
        return tuple(_convert(parts[0], item, f"{key}[{i}]", origin) for i, item in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        names = {int: "an integer", float: "a number", str: "text", bool: "true or false"}
        remedy = "; put it in quotes" if hint is str and value is not None else ""
        raise RecipeError(f"{origin}: {key} must be {names[hint]}, not {_describe(value)}{remedy}", key)
    return value


def _build(merged: Mapping[str, Any]) -> Recipe:
    """The merged, checked mapping as a Recipe. Range checks happen in the dataclasses."""
    recipe: Recipe = _block(Recipe, {"data": {}} | dict(merged))
    return _with_trigger(recipe)


def _block(cls: type, values: Mapping[str, Any]) -> Any:
    """A dataclass from its values, the blocks inside it first."""
    hints = typing.get_type_hints(cls)
    return cls(**{k: _block(hints[k], v) if dataclasses.is_dataclass(hints[k]) else v for k, v in values.items()})


def _with_trigger(recipe: Recipe) -> Recipe:
    """`{trigger}` replaced in constant caption, template and sample prompts. Raises RecipeError without a trigger."""
    texts = {
        "data.caption": (recipe.data.caption,),
        "data.caption_template": (recipe.data.caption_template,),
        "sample.prompts": recipe.sample.prompts,
    }
    saying = [key for key, said in texts.items() if any("{trigger}" in text for text in said)]
    if not saying:
        return recipe
    if not recipe.data.trigger:
        says = f"{' and '.join(saying)} {'say' if len(saying) > 1 else 'says'}"
        raise RecipeError(f"{says} {{trigger}}, but data.trigger is empty: give the words", "data.trigger", *saying)
    caption, template, *prompts = (
        text.replace("{trigger}", recipe.data.trigger) for said in texts.values() for text in said
    )
    return dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, caption=caption, caption_template=template),
        sample=dataclasses.replace(recipe.sample, prompts=tuple(prompts)),
    )


def _blamed(keys: Sequence[str], origins: dict[str, str], overrides: Sequence[str]) -> str:
    """Who set what is at fault: of `keys` that contradict each other every override, without one the last file; "" if nobody."""
    setters = list(dict.fromkeys(origins[key] for key in reversed(origins) if key in keys))
    typed = [override for override in dict.fromkeys(overrides) if _of_override(override) in setters]
    if len(typed) > 1:
        return f"overrides {' and '.join(map(repr, typed))}"
    return _of_override(typed[0]) if typed else next(iter(setters), "")


def _of_override(override: str) -> str:
    """The origin of what `override` sets."""
    return f"override {override!r}"


def _nearest(given: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(given, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def _describe(value: Any) -> str:
    names = {bool: "boolean", int: "integer", float: "number", str: "text", list: "list", dict: "block of keys"}
    return "nothing" if value is None else f"{value!r} ({names.get(type(value), type(value).__name__)})"
