"""Tests; `typechecker` checks annotations under `--jaxtyping-packages` as mypy reads them: int passes for float."""

from beartype import BeartypeConf, beartype

typechecker = beartype(conf=BeartypeConf(is_pep484_tower=True))
