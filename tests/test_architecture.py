"""The page of the three paths names files that exist, each once in a path."""

import re
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
_, *PATHS = (REPOSITORY / "ARCHITECTURE.md").read_text(encoding="utf-8").split("\n## ")


def test_every_file_on_the_page_exists_and_is_named_once() -> None:
    assert len(PATHS) == 3
    for path in PATHS:
        files = re.findall(r"`([\w/]+\.py)`", path)
        assert len(files) > 10
        assert [file for file in files if not (REPOSITORY / "lightning_em" / file).is_file()] == []
        assert len(set(files)) == len(files)
