"""The textual side of recipes: strict YAML, ``key.path=value`` overrides, and errors of one line that name the place.

What is in here knows pydantic and YAML, but no key of a recipe: the vocabulary is in :mod:`stepdistill.recipe`.
"""

from __future__ import annotations

import difflib
import json
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from stepdistill.errors import UserError


# YAML 1.1, which PyYAML follows, calls a number with an exponent a float only if it has a point and a signed exponent.
_EXPONENT = re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)[eE][-+]?[0-9]+$")
NESTED = "nested_options"  # type of a pydantic error whose lines are told already, but for their place
_WHOLE_PATH = re.compile(r"^[^.=\s]+(\.[^.=\s]+)*$")

_EXPECTED = {
    "int": "an integer", "float": "a number", "finite_number": "a finite number", "bool": "true or false",
    "string": "text", "tuple": "a list", "list": "a list", "dict": "a mapping", "model": "a mapping",
    "mapping": "a mapping", "dataclass": "a mapping", "none": "null", "literal_error": "{expected}",
    "enum": "{expected}", "greater_than": "more than {gt}", "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}", "less_than_equal": "at most {le}", "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}", "string_too_short": "text that is not empty",
    "string_pattern_mismatch": "letters, digits and any of _ . - (letter or digit first)",
}  # fmt: skip


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML carries no types
    """YAML without surprises: ``1e-4`` is a number, and a key that comes twice is an error, not the last one's win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # no recipe has such keys, and what PyYAML says of them is clear
            if key.value in seen:
                problem = f"the key {key.value!r} comes twice"
                raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Quotes text that the loader above would take for a number, and never writes anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _yaml_class in (_Loader, _Dumper):
    _yaml_class.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))


def parse_yaml(text: str, source: str) -> Any:
    """YAML text => plain values; a mistake in it is a UserError that names file and line."""
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader: plain values only
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{source}:{mark.line + 1}" if mark else source
        raise UserError(f"{place}: not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None


def dump_yaml(content: Mapping[str, Any]) -> str:
    """Plain values => YAML that ``parse_yaml`` reads back to equal values, in the order given."""
    return str(yaml.dump(dict(content), Dumper=_Dumper, sort_keys=False, width=119, allow_unicode=True))


def to_json(content: Any, source: str) -> str:
    """Plain values => JSON, of which pydantic's strict mode takes lists for tuples, but not true for 1."""
    try:
        return json.dumps(content, default=str)
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{source}: holds values that are not plain data: {error}") from None


def closest(word: str, valid: Iterable[str]) -> str | None:
    """The valid word that was probably meant, or None."""
    return next(iter(difflib.get_close_matches(word, list(valid), n=1)), None)


def nearest(word: str, valid: Iterable[str]) -> str:
    """The remedy for a wrong word: the nearest valid one, or all of them where none is near."""
    known = list(valid)
    close = closest(word, known)
    if close is not None:
        return f"did you mean {close!r}?"
    return f"valid: {', '.join(known)}" if known else "there is nothing to choose from"


def key_and_value(text: str, where: str, expected: str) -> tuple[str, str]:
    """``key=value`` => both; for words of a command that are no overrides of a recipe.

    Args:
        text: the word.
        where: what errors call its place, up to the word itself.
        expected: how errors go on behind "is not", with an example.

    Raises:
        UserError: There is no equals sign.
    """
    key, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"{where} is not {expected}")
    return key, value


def apply_override(content: dict[str, Any], text: str, what: str = "override") -> str:
    """Sets one ``key.path=value`` in nested plain values, in place, and returns the key path.

    Errors begin with `what`. Whether the key exists is for the models to say; only a path that cannot be followed is
    an error here.
    """
    path, equals, value = text.partition("=")
    if not equals or not _WHOLE_PATH.match(path):
        raise UserError(f"{what} {text!r}: expected key.path=value, for example stages.0.steps=100")
    keys = path.split(".")
    target: dict[str, Any] | list[Any] = content
    for depth, key in enumerate(keys[:-1]):
        entry = _entry(target, key, f"{what} {path}")
        if entry is None:
            entry = {}
        if not isinstance(entry, (dict, list)):
            raise UserError(f"{what} {path}: {'.'.join(keys[: depth + 1])} is {reprlib.repr(entry)} and has no keys")
        _set(target, key, entry)
        target = entry
    _entry(target, keys[-1], f"{what} {path}")
    _set(target, keys[-1], parse_yaml(value, f"{what} {path}"))
    return path


def _entry(target: dict[str, Any] | list[Any], key: str, where: str) -> Any:
    if isinstance(target, dict):
        return target.get(key)
    if not key.isdecimal() or int(key) >= len(target):
        raise UserError(f"{where}: {key!r} is not an entry of the list; valid: 0 to {len(target) - 1}")
    return target[int(key)]


def _set(target: Any, key: str, value: Any) -> None:
    target[int(key) if isinstance(target, list) else key] = value


def explain(
    error: ValidationError,
    model: type[BaseModel] | None,
    content: Any,
    source: str,
    *,
    overridden: Sequence[str] = (),
    joint: str = ": ",
) -> list[str]:
    """A line for every mistake that pydantic found: place, what was expected, what came, the nearest valid name.

    Args:
        model: The model that ``content`` was validated against, for its valid names.
        content: The plain values that were validated.
        source: The file, as error messages call it.
        overridden: Key paths that came from the command line instead; their errors name them so.
        joint: What stands between source and key.
    """
    found: dict[tuple[int | str, ...], list[Any]] = {}
    for problem in error.errors(include_url=False):
        found.setdefault(_real_path(problem["loc"], content, missing=problem["type"] == "missing"), []).append(problem)
    unknown = [path for path, problems in found.items() if problems[0]["type"] == "extra_forbidden"]
    meant = {(*path[:-1], closest(str(path[-1]), _valid_names(model, path[:-1]))) for path in unknown}
    # What is wrong with a part explains why the whole was refused, and a mistyped key why the right one is missing:
    # one mistake, one line.
    inner = {path[:depth] for path in found for depth in range(len(path))}
    paths = [path for path in found if path not in meant and path not in inner]
    lines = []
    for path in paths:
        key = ".".join(map(str, path))
        given = any(f"{key}.".startswith(f"{other}.") for other in overridden)
        place = f"override {key}" if given else f"{source}{joint}{key}" if key else source
        told = [line for problem in found[path] if problem["type"] == NESTED
                for line in problem["ctx"]["lines"].splitlines()]  # fmt: skip
        lines += [f"{place}{line}" for line in told] or [f"{place}: {_what(found[path], model, path)}"]
    return lines


def _real_path(loc: tuple[int | str, ...], content: Any, *, missing: bool) -> tuple[int | str, ...]:
    """Drops what pydantic adds to a location for the members of a union, which no user has written."""
    path: list[int | str] = []
    for index, part in enumerate(loc):
        in_mapping = isinstance(content, Mapping) and part in content
        if in_mapping or (isinstance(content, list) and isinstance(part, int) and part < len(content)):
            content = content[part]
        elif not (missing and index == len(loc) - 1):
            continue
        path.append(part)
    return tuple(path)


def _what(problems: Sequence[Any], model: type[BaseModel] | None, path: Sequence[int | str]) -> str:
    """The second half of a line: the members of a union have a problem each at the same place."""
    kinds = [problem["type"] for problem in problems]
    if "missing" in kinds:
        return "missing; this key has no default"
    if "extra_forbidden" in kinds:
        return f"unknown key; {nearest(str(path[-1]), _valid_names(model, path[:-1]))}"
    value = problems[0]["input"]
    phrases = [_EXPECTED.get(kind) or _EXPECTED.get(kind.split("_")[0], "") for kind in kinds]
    if "" in phrases:
        return str(problems[phrases.index("")]["msg"]).removeprefix("Value error, ").replace("\n", " ")
    wanted = [phrase.format(**problem.get("ctx", {})) for phrase, problem in zip(phrases, problems, strict=True)]
    words = re.findall(r"'([^']*)'", " ".join(wanted))
    close = closest(value, words) if isinstance(value, str) else None
    return (f"expected {' or '.join(dict.fromkeys(wanted))}, got {_show(value)}"
            + (f"; did you mean {close!r}?" if close else ""))  # fmt: skip


def _valid_names(model: type[BaseModel] | None, path: Sequence[int | str]) -> list[str]:
    """The keys that the models allow at a place: Recipe, (stages, 0) => StageConfig's."""
    models = [model] if model else []
    for part in path:
        for candidate in models:
            if part in candidate.model_fields:
                models = _models_in(candidate.model_fields[str(part)].annotation)
                break
    return [name for candidate in models for name in candidate.model_fields]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in get_args(annotation) for found in _models_in(part)]


def _show(value: Any) -> str:
    return "a mapping" if isinstance(value, Mapping) else reprlib.repr(value)
