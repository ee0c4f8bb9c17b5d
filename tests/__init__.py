"""Tests; `typechecker` is what `--jaxtyping-packages` checks annotations with, as mypy reads them: int passes for float."""

from beartype import BeartypeConf, beartype

typechecker = beartype(conf=BeartypeConf(is_pep484_tower=True))
