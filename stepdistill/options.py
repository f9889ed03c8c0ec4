"""Options of a dataclass as plain values, both ways: what a recipe says => a checked instance => what it would say.

A field may itself be an objective or another dataclass with options (`NestedOptions`); mistakes inside of it are told
with the same lines, at the same places, as those at the top.
"""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast, get_type_hints

from pydantic import TypeAdapter, ValidationError
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from stepdistill.errors import UserError
from stepdistill.recipe_text import NESTED, closest, explain, nearest, to_json


if TYPE_CHECKING:
    from stepdistill.objectives.base import Objective


@dataclasses.dataclass(frozen=True)
class NestedOptions:
    """Annotates a field that a recipe writes as a mapping of its own.

    Attributes:
        read: (mapping, place) => the field's value; its UserError has a line for every mistake, each of which begins
            with the place.
        write: the field's value => the mapping.
    """

    read: Callable[[Mapping[str, Any], str], Any]
    write: Callable[[Any], dict[str, Any]]

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        writing = core_schema.plain_serializer_function_ser_schema(self.write)
        return core_schema.no_info_plain_validator_function(self._validate, serialization=writing)

    def _validate(self, value: Any) -> Any:
        try:
            if not isinstance(value, Mapping):
                raise UserError(f": expected a mapping, got {reprlib.repr(value)}")
            return self.read(value, "")
        except UserError as error:
            raise PydanticCustomError(NESTED, "{lines}", {"lines": str(error)}) from error


def read_objective(entry: Mapping[str, Any], where: str) -> Objective:
    """The objective that an entry ``{name: vsd, guidance: 3.0}`` describes."""
    name = entry.get("name")
    if not isinstance(name, str):
        raise UserError(f"{where}.name: expected an objective's name, got {reprlib.repr(name)}")
    return build_named(name, {key: value for key, value in entry.items() if key != "name"}, where)


def write_objective(objective: Objective) -> dict[str, Any]:
    """The entry that describes an objective, all defaults written out."""
    from stepdistill.objectives import name_of

    return {"name": name_of(type(objective)), **plain_options(objective)}


OBJECTIVE = NestedOptions(read_objective, write_objective)


def options_of(kind: type[Any]) -> NestedOptions:
    """The annotation of a field that holds another dataclass with options."""
    return NestedOptions(lambda options, where: build_dataclass(kind, options, where), plain_options)


def build_named(name: str, options: Mapping[str, Any], where: str) -> Objective:
    """An objective by its name in a recipe: name => class => checked fields => instance.

    Args:
        name: Of our table, of an installed package, or "package.module:Class".
        options: Fields of its dataclass.
        where: How error messages call the place, for example ``recipes/x.yaml: stages.0.objective``.

    Raises:
        UserError: No such objective, or a line for every mistake in its options.
    """
    from stepdistill.objectives import resolve

    try:
        kind = resolve(name)
    except UserError as error:
        raise UserError(f"{where}.name: {error}") from error
    if not dataclasses.is_dataclass(kind):
        raise UserError(f"{where}.name: {name} is no dataclass, so it cannot have options; add @dataclass")
    return cast("Objective", build_dataclass(kind, options, where))


def build_dataclass(kind: type[Any], options: Mapping[str, Any], where: str) -> Any:
    """An instance of a dataclass from plain values, checked against its fields' names and types.

    Raises:
        UserError: A line for every unknown, ill-typed or missing field, or what the class itself refuses.
    """
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    values, problems = {}, []
    for name, value in options.items():
        if name not in fields:
            problems.append(f"{where}.{name}: unknown key; {nearest(name, fields)}")
            continue
        try:
            values[name] = _option_type(kind, name).validate_json(to_json(value, where), strict=True)
        except ValidationError as error:
            problems += explain(error, None, value, f"{where}.{name}", joint=".")
    given = {
        *options,
        *(closest(name, fields) for name in options if name not in fields),
    }  # a mistyped one is told above
    absent = [name for name, field in fields.items() if name not in given and _has_no_default(field)]
    problems += [f"{where}.{name}: missing; this key has no default" for name in absent]
    if problems:
        raise UserError("\n".join(problems))
    try:
        return kind(**values)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def plain_options(instance: Any) -> dict[str, Any]:
    """All options of a dataclass as plain values, as a recipe would write them, defaults included."""
    names = [field.name for field in dataclasses.fields(instance) if field.init]
    return {name: _option_type(type(instance), name).dump_python(getattr(instance, name), mode="json")
            for name in names}  # fmt: skip


def _option_type(kind: type[Any], name: str) -> TypeAdapter[Any]:
    return TypeAdapter(get_type_hints(kind, include_extras=True)[name])


def _has_no_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
