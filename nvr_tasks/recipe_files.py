"""From a YAML file and `a.b=c` overrides to a `Recipe`, or to an error that names the key, the value and what is allowed."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml
from pydantic import ValidationError

from nvr_tasks.config import Recipe
from nvr_tasks.errors import RecipeError
from nvr_tasks.mine_settings import Mine
from nvr_tasks.storage import hide_secrets

NOT_YAML = frozenset(  # kinds of validation errors whose messages speak of Python
    {"tuple_type", "list_type", "set_type", "dict_type", "mapping_type", "model_type", "model_attributes_type"}
)
MAX_NODES = 100_000  # values of a recipe, its aliases written out


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(
        f.name.removesuffix(".yaml") for f in files("nvr_tasks.recipes").iterdir() if f.name.endswith(".yaml")
    )


def load_recipe(recipe: str, overrides: Iterable[str] = ()) -> Recipe:
    """Load a shipped recipe by name or a YAML file by path and apply `a.b=c` overrides.

    Raises:
        RecipeError: the file is missing or not YAML, a key is unknown, a value is not allowed. The message names the
            key, the value and what is allowed.
    """
    return parse_recipe(_read(recipe), source=recipe, overrides=overrides)


def parse_recipe(text: str, source: str, overrides: Iterable[str] = ()) -> Recipe:
    """Validate the YAML `text` of a recipe; `source` is its name in error messages."""
    try:
        return _parse(text, source, overrides)
    except RecipeError as error:  # whatever it quotes of the recipe, it quotes no secret
        raise RecipeError(hide_secrets(str(error))) from None


def _refuse_double_keys(node: yaml.Node | None, seen: set[int]) -> None:
    """Raise YAMLError for a key that comes twice in a mapping, where plain YAML lets the last one win in silence."""
    if node is None or id(node) in seen:  # an alias leads to a node that was here before
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for child in node.value:
            _refuse_double_keys(child, seen)
    if isinstance(node, yaml.MappingNode):
        keys: set[str] = set()
        for key, child in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in keys:
                    raise yaml.MarkedYAMLError(problem=f"{key.value} is there twice", problem_mark=key.start_mark)
                keys.add(key.value)
            _refuse_double_keys(child, seen)


def _parse(text: str, source: str, overrides: Iterable[str]) -> Recipe:
    try:
        _refuse_double_keys(yaml.compose(text, yaml.SafeLoader), set())
        tree = _unshared(yaml.safe_load(text), [MAX_NODES])
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe {source} is not YAML: {error}") from None
    except RecursionError:
        raise RecipeError(f"recipe {source} is nested too deeply, or within itself: write it out") from None
    if not isinstance(tree, dict):
        raise RecipeError(
            f"recipe {source} is {type(tree).__name__}, expected a mapping with the keys of `nvr config --json-schema`"
        )
    _override_all(tree, list(overrides))
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        errors = error.errors()
        # A list with a wrong item counts as too short as well: what is wrong inside says it all.
        inner = {e["loc"][:i] for e in errors for i in range(len(e["loc"]))}
        lines = [_explain(e) for e in errors if e["type"] != "too_short" or e["loc"] not in inner]
        raise RecipeError(f"recipe {source} is not valid:\n" + "\n".join(f"  - {line}" for line in lines)) from None


def _read(recipe: str) -> str:
    if "/" not in recipe and not recipe.endswith((".yaml", ".yml")):
        if recipe not in shipped_recipes():
            near = difflib.get_close_matches(recipe, shipped_recipes(), n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise RecipeError(
                f"no recipe named {recipe!r}.{hint} Shipped: {', '.join(shipped_recipes())}; or give the path of a YAML file"
            )
        return (files("nvr_tasks.recipes") / f"{recipe}.yaml").read_text(encoding="utf-8")
    if recipe.startswith("s3://"):
        from nvr_tasks.storage import open_storage

        folder, _, name = recipe.rpartition("/")
        if folder == "s3:/" or not name:
            raise RecipeError(f"{recipe} names no recipe: expected s3://bucket/…/NAME.yaml")
        data = open_storage(folder).get_bytes(name)
        if data is None:
            raise RecipeError(f"no recipe at {recipe}")
        return _text(data, recipe)
    path = Path(unquote(urlsplit(recipe).path) if recipe.startswith("file://") else recipe)
    try:
        return _text(path.read_bytes(), recipe)
    except OSError as error:
        raise RecipeError(
            f"cannot read recipe {path}: {error.strerror}; shipped recipes: {', '.join(shipped_recipes())}"
        ) from None


def _text(data: bytes, source: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"recipe {source} is not UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8 text"
        ) from None


def _unshared(node: Any, left: list[int]) -> Any:
    """A copy in which every YAML alias is a tree of its own, so that an override changes one place only.

    Args:
        left: how many nodes there may still be; aliases of aliases could ask for more than memory holds.
    """
    left[0] -= 1
    if left[0] < 0:
        raise yaml.YAMLError(f"its aliases stand for more than {MAX_NODES:,} values")
    if isinstance(node, dict):
        return {key: _unshared(child, left) for key, child in node.items()}
    return [_unshared(child, left) for child in node] if isinstance(node, list) else node


def _override_all(tree: dict[str, Any], overrides: list[str]) -> None:
    """Apply overrides in their order. Another mining method than the recipe's starts from its own default threshold."""
    before = _method(tree)
    for override in overrides:
        _override(tree, override)
    given = {override.partition("=")[0].strip() for override in overrides}
    if _method(tree) != before and not given & {"mine", "mine.threshold"} and isinstance(tree["mine"], dict):
        tree["mine"].pop("threshold", None)


def _method(tree: dict[str, Any]) -> Any:
    mine = tree.get("mine")
    default = Mine.model_fields["method"].default
    return mine.get("method", default) if isinstance(mine, dict) else default


def _override(tree: dict[str, Any], override: str) -> None:
    """Apply one `a.b.0.c=value` to the raw tree; the value is YAML."""
    key, equals, raw = override.partition("=")
    *parents, last = key.strip().split(".")
    if not equals or not last or not all(parents):
        raise RecipeError(f"override {override!r} is not of the form key.path=value, e.g. train.steps=100")
    node: Any = tree
    for part in parents:
        node = _child(node, part, override)
    try:
        value = yaml.safe_load(raw)
    except yaml.YAMLError as error:
        raise RecipeError(f"override {override!r}: the value is not YAML: {error}") from None
    # YAML 1.1 reads 1e-4 as text; people mean the number (and write "1e-4" for the text).
    if re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", raw.strip()):
        value = float(raw)
    if isinstance(node, list):
        node[_index(node, last, override)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise RecipeError(f"override {override!r}: {'.'.join(parents)} is a value, not a group of settings")


def _child(node: Any, part: str, override: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, part, override)]
    if isinstance(node, dict):
        return node.setdefault(part, {})
    raise RecipeError(f"override {override!r}: {part!r} lies below a value, not below a group of settings")


def _index(node: list[Any], part: str, override: str) -> int:
    if not part.isdecimal() or not part.isascii() or int(part) >= len(node):
        raise RecipeError(
            f"override {override!r}: {part!r} is not an index of a list of {len(node)} (0 to {len(node) - 1})"
        )
    return int(part)


def _explain(error: Any) -> str:
    """One validation error as: key, value, what is allowed."""
    path, beside, node = _follow(error["loc"])
    where = ".".join(path) or "recipe"
    kind, value = error["type"], error.get("input")
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(path[-1], beside, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        return f"{where}: unknown key (value {value!r}).{hint} Allowed here: {', '.join(beside)}"
    if kind == "missing":
        return f"{where}: required, but missing"
    if kind == "value_error":
        return f"{where}: {error['ctx']['error']}" if path else str(error["ctx"]["error"])
    wanted = _in_yaml(node, value) if kind in NOT_YAML else f"{error['msg'][0].lower()}{error['msg'][1:]}"
    return f"{where}: {value!r} is not allowed: {wanted}"


def _in_yaml(node: dict[str, Any], given: Any) -> str:
    """What a list, a section or a mapping looks like in a recipe, where pydantic speaks of tuples and instances."""
    schema = Recipe.model_json_schema(by_alias=True)
    meaning = f" ({node['description'].rstrip('.')})" if "description" in node else ""
    node = _resolve(schema, node)
    if node.get("type") == "array":
        lone = isinstance(given, str | int | float) and "type" in _resolve(schema, node.get("items", {}))
        simple = lone and _resolve(schema, node["items"])["type"] not in ("array", "object")
        word = json.dumps(given, ensure_ascii=False) if set(str(given)) & set(":#,[]{}") else given
        return f"input should be a list, e.g. {f'[{word}]' if simple else _example(schema, node)}{meaning}"
    keys = sorted(node.get("properties", {}))
    kind, known = ("section", f"; its keys: {', '.join(keys)}") if keys else ("mapping", "")
    return f"input should be a {kind}, e.g. {_example(schema, node)}{known or meaning}"


def _example(schema: dict[str, Any], node: dict[str, Any], depth: int = 3) -> str:
    """A value that a schema may stand for, in YAML's short form; … where one has to be thought of."""
    node = _resolve(schema, node)
    if "discriminator" in node:
        return f"{{{node['discriminator']['propertyName']}: {next(iter(node['discriminator']['mapping']))}, …}}"
    if node.get("type") == "array":
        return f"[{_example(schema, node.get('items', {}), depth - 1)}]"
    if node.get("type") == "object":
        fields = node.get("properties", {})
        shown = {name: fields[name] for name in node.get("required", list(fields)[:1])}
        if not fields:
            shown = {"NAME": _value_of(node)}
        inner = (f"{name}: {_example(schema, field, depth - 1)}" for name, field in shown.items())
        return f"{{{', '.join(inner)}}}" if depth else "{…}"
    if "default" in node and isinstance(node["default"], str | int | float) and node["default"] != "":
        return json.dumps(node["default"], ensure_ascii=False).strip('"')
    return str(node.get("const") or node.get("enum", ["…"])[0])


def _follow(location: tuple[str | int, ...]) -> tuple[list[str], list[str], dict[str, Any]]:
    """The path of `location` as people write it, the keys that the schema allows beside its last part, and its schema."""
    schema = Recipe.model_json_schema(by_alias=True)
    node, path, beside = schema, [], []
    for part in location:
        node = _resolve(schema, node)
        kinds = node.get("discriminator", {}).get("mapping", {})
        if part in kinds:  # pydantic puts the tag of a union into the location; no recipe has it there
            node = {"$ref": kinds[part]}
            continue
        beside = sorted(node.get("properties", {}))
        path.append(str(part))
        node = (
            node.get("items", {}) if isinstance(part, int) else node.get("properties", {}).get(part) or _value_of(node)
        )
    return path, beside, node


def _value_of(mapping: dict[str, Any]) -> dict[str, Any]:
    """The schema of the values of a mapping whose keys are free."""
    found: Any = mapping.get("additionalProperties") or next(iter(mapping.get("patternProperties", {}).values()), {})
    return found if isinstance(found, dict) else {}


def _resolve(schema: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in node or "anyOf" in node:
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rsplit("/", 1)[-1]]
            continue
        inner = [n for n in node["anyOf"] if n.get("type") != "null"]  # of a setting that may be null
        if len(inner) != 1:
            break
        node = inner[0]
    return node


def json_schema() -> str:
    """The recipe's JSON schema."""
    return json.dumps(Recipe.model_json_schema(by_alias=True), indent=2, ensure_ascii=False)
