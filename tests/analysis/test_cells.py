"""study.json is the bridge: what is written is read."""

import json

import pytest

from lightning_em.analysis.cells import Cell, StudyFolder

GENERAL = Cell("general-rank1-seed0", "general", "general", None, "rank1", "default", 0)
REVERTED = Cell("reverted-rank1-seed0", "reverted", "reverted", 2.0, "rank1", "default", 0, GENERAL.run)


def test_cells_are_read_as_they_were_written(tmp_path) -> None:
    study = StudyFolder(tmp_path / "study")
    study.write("miniature", [GENERAL, REVERTED])
    assert (study.name, study.cells()) == ("miniature", [GENERAL, REVERTED])
    assert study.run(GENERAL).path == tmp_path / "study" / GENERAL.run
    content = json.loads(study.file.read_text())
    assert content["schema"] == 2
    assert content["cells"][1]["init_from"] == GENERAL.run


def test_finished_cells_are_those_whose_run_says_so(tmp_path) -> None:
    study = StudyFolder(tmp_path)
    study.write("miniature", [GENERAL, REVERTED])
    assert study.finished() == []
    study.run(GENERAL).update_run(status="finished")
    study.run(REVERTED).update_run(status="failed")
    assert study.finished() == [GENERAL]


def test_what_cannot_be_meant_is_refused(tmp_path) -> None:
    study = StudyFolder(tmp_path)
    with pytest.raises(ValueError, match="there is no study at"):
        study.cells()
    with pytest.raises(ValueError, match=r"used more than once: \['general-rank1-seed0'\]"):
        study.write("miniature", [GENERAL, GENERAL])
    with pytest.raises(ValueError, match=r"\['general-rank1-seed0'\] that are no cells"):
        study.write("miniature", [REVERTED])
    study.file.write_text('{"schema": 7, "name": "x", "cells": []}')
    with pytest.raises(ValueError, match="has schema 7, expected 2"):
        study.cells()


@pytest.mark.parametrize(
    "content", ['{"schema": 2, "na', "[]", '{"schema": 2}', '{"schema": 2, "cells": [{"run": "a"}]}']
)
def test_a_damaged_study_is_named(tmp_path, content) -> None:
    study = StudyFolder(tmp_path)
    study.file.write_text(content)
    with pytest.raises(ValueError, match=r"study\.json is damaged .*study expand"):
        study.cells()
