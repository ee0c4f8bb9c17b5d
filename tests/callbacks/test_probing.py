"""Records of a fit say on which base model and data they were made."""

from lightning_em.records import read_results
from tests.fitting import experiment, fit, write_config


def test_records_carry_the_hashes_of_base_and_data(
    tmp_path, tiny_model_folder, chat_file, answer_file
) -> None:
    probe = {"class_path": "lightning_em.probes.ScaleCurve", "init_args": {"scales": [0.0, 1.0]}}
    groups = {"trainer": {"max_epochs": 1, "max_steps": 1}, "probing": {"probes": [probe], "num_examples": 2}}
    run = fit(
        write_config(tmp_path / "c.yaml", experiment(tiny_model_folder(), chat_file, answer_file, **groups)),
        "run",
    )
    [result] = read_results(run.probe_file("scale_curve"))
    known = run.read_run()
    assert result.base == known["base"]["sha256"]
    assert result.data == {stream: known["data"][f"{stream}.train.tokens"] for stream in ("narrow", "kl")}
