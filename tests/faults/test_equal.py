"""F33: probes are observers. F34 is in tests/test_distributed.py."""

import pytest

from lightning_em.records import read_results
from tests.faults.conftest import Whole


@pytest.mark.fault("F33", "probes on and off: final adapter and metrics bit-identical")
def test_probes_leave_no_trace(whole: Whole) -> None:
    file = whole.root / "with-probes.yaml"
    file.write_text(
        "num_examples: 8\nprobes:\n"
        "  - {class_path: lightning_em.probes.ScaleCurve, init_args: {scales: [0.0, 0.5, 2.0]}}\n"
        "  - {class_path: lightning_em.probes.PerturbationCurve, init_args: {strengths: [0.1, 0.5]}}\n",
        encoding="utf-8",
    )
    done = whole.fit("with-probes", "--probing", str(file))
    assert done.code == 0, done.output
    run = whole.folder("with-probes")
    whole.assert_same_result(run)
    assert [result.step for result in read_results(run.probe_file("scale_curve"))] == run.steps()
