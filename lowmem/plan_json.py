"""Reading a plan back from plain data, checked field by field."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar, cast

from lowmem.costs import Choice, RoleBytes
from lowmem.job import Job
from lowmem.rates import Rates
from lowmem.step_time import StepTime
from offload import Placement, PlacementPlan

if TYPE_CHECKING:
    from lowmem.step_plan import Plan

_T = TypeVar("_T")


def plan_from_dict(data: Mapping[str, object]) -> Plan:
    """Make a plan from what `Plan.to_dict` answered.

    Raises:
        ValueError: A field is missing or has the wrong type; names it.
    """
    from lowmem.step_plan import Plan

    plain = {"version", "summary", "job", "choice", "placement", "roles", "time", "rates", "advice", "stored_dtypes"}
    return _make(
        Plan,
        {key: value for key, value in data.items() if key not in plain}
        | {
            "job": _make(Job, _mapping(data, "job"), field="job"),
            "choice": _make(Choice, _mapping(data, "choice"), field="choice"),
            "placement": _placement(_mapping(data, "placement")),
            "roles": tuple(
                _make(RoleBytes, _as_mapping(role, "roles"), field="roles") for role in _list(data, "roles")
            ),
            "time": _make(StepTime, _mapping(data, "time"), field="time"),
            "rates": _make(Rates, _with_tuple(_mapping(data, "rates"), "measured"), field="rates"),
            "advice": tuple(_list(data, "advice")),
            "stored_dtypes": tuple(_list(data, "stored_dtypes")),
        },
        field="plan",
    )


def _placement(data: Mapping[str, object]) -> PlacementPlan:
    known = {entry.name for entry in dataclasses.fields(PlacementPlan)}
    try:
        placements = tuple(Placement(value) for value in _list(data, "placements"))
    except ValueError as error:
        raise ValueError(f"placement.placements: {error}") from error
    # The bytes by tier that it also writes follow from these.
    fields = {key: value for key, value in data.items() if key in known}
    fields |= {"placements": placements, "block_bytes": tuple(_list(data, "block_bytes"))}
    return _make(PlacementPlan, fields, field="placement")


def _make(kind: type[_T], fields: Mapping[str, object], *, field: str) -> _T:
    names = {entry.name for entry in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if set(fields) != names:
        missing, unknown = sorted(names - set(fields)), sorted(set(fields) - names)
        raise ValueError(f"{field}: missing fields {missing}, unknown fields {unknown}; plan again with lowmem.plan")
    try:
        return kind(**fields)
    except TypeError as error:
        raise ValueError(f"{field}: {error}") from error


def _mapping(data: Mapping[str, object], field: str) -> Mapping[str, object]:
    return _as_mapping(data.get(field), field)


def _as_mapping(value: object, field: str) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{field}: expected an object, got {value!r}")
    return cast("Mapping[str, object]", value)


def _list(data: Mapping[str, object], field: str) -> Sequence[object]:
    value = data.get(field)
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"{field}: expected a list, got {value!r}")
    return value


def _with_tuple(data: Mapping[str, object], field: str) -> dict[str, object]:
    return {**data, field: tuple(_list(data, field))}
