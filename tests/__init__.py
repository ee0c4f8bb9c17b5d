"""Tests; `typechecker` checks annotations under `--jaxtyping-packages` as mypy reads them: int passes for float."""

from types import CodeType, FunctionType
from typing import Any

from beartype import BeartypeConf, beartype

_check = beartype(conf=BeartypeConf(is_pep484_tower=True))
_checks: dict[tuple[str, str, CodeType, str], Any] = {}


def typechecker(function: FunctionType) -> Any:
    """Wrap a function so that each call checks its annotations; functions of one signature share a wrapper.

    jaxtyping (0.3) hands in functions without a body that only repeat a signature, and does so again each time that
    a function inside another function is made. beartype writes and compiles a wrapper for each, which took several
    milliseconds. jaxtyping's array types are new classes each time: equal ones have an equal `repr`.
    """
    annotations = repr(function.__annotations__)
    if function.__defaults__ or function.__kwdefaults__ or "<locals>" in annotations:
        return _check(function)
    key = (function.__module__, function.__qualname__, function.__code__, annotations)
    if key not in _checks:
        _checks[key] = _check(function)
    return _checks[key]
