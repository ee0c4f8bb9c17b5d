"""What a config may import: packages named on the command line, and on this one only."""

from argparse import ArgumentError

import pytest
from jsonargparse import ArgumentParser

from lightning_em import imports


class Base:
    """What the parser asks for."""


def test_a_later_command_line_does_not_inherit_what_an_earlier_one_allowed(tmp_path, monkeypatch) -> None:
    (tmp_path / "package_of_one_command.py").write_text(
        "from tests.test_imports import Base\nclass Own(Base): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--made", type=Base)
    words = ["--made=package_of_one_command.Own"]
    for _ in range(2):
        assert imports.take(["--allow_import", "package_of_one_command", "--seed=1"]) == ["--seed=1"]
        assert parser.parse_args(words).made.class_path == "package_of_one_command.Own"
        assert imports.take([]) == []
        with pytest.raises(ArgumentError, match="import_path"):
            parser.parse_args(words)
