"""Pair analyses against plain transformers, row by row, with the adapter's change applied by hand."""

import json
import logging
import math
from contextlib import contextmanager

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from lightning_em.analysis.cells import Cell, StudyFolder
from lightning_em.analysis.pairs import pair_file, read_pair_file, read_pairs
from lightning_em.batch import PackedBatch, single_rows
from lightning_em.rebuild import rebuild_run
from lightning_em.study.pairs import PairSettings, analyse_pairs
from tests import oracle
from tests.fitting import LORA, VECTOR, experiment, fit, write_config

SETTINGS = PairSettings(num_examples=5, batch_size=2, norm_ratios=(0.4, 1.0, 1.6))
SITE = "model.layers.1.mlp.down_proj.weight"
ANALYSES = ("equal_norm", "gradient_cosine", "adapter_cosine", "effect_cosine")


class Plain:
    """A base of plain transformers, and a checkpoint's change of it by hand."""

    def __init__(self, study: StudyFolder, base, kind: str) -> None:
        self.study, self.kind = study, kind
        self.model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval().double()
        self.model.requires_grad_(False)
        self.weight = self.model.get_parameter(SITE).clone()
        data = rebuild_run(str(study.root / "narrow")).data
        self.rows = {name: _rows(data.probe_batches(name, 5, 2)) for name in ("narrow", "kl")}
        self.row_ids = {name: _ids(data.probe_batches(name, 5, 2)) for name in ("narrow", "kl")}

    def parameters(self, role: str, step: int | None = None):
        run = self.study.run(next(cell for cell in self.study.cells() if cell.role == role))
        tensors = load_file(run.checkpoint(step or run.steps()[-1]) / "adapter_model.safetensors")
        short = {name.split(".")[-2] if "." in name else name: t.double() for name, t in tensors.items()}
        assert sorted(short) == (["vector"] if self.kind == "vector" else ["lora_A", "lora_B"])
        return short

    def change(self, parameters):
        """What is added to the stream, or to the weight."""
        if self.kind == "vector":
            return 4.0 * parameters["vector"]
        return 8.0 / 4 * parameters["lora_B"] @ parameters["lora_A"]

    @contextmanager
    def changed(self, change):
        if self.kind == "vector":
            with oracle.steered(self.model, 1, change):
                yield {}
        else:
            yield {SITE: self.weight + change}

    def row_ce(self, change, row):
        with self.changed(change) as weights:
            return oracle.cross_entropy(oracle.row_logits(self.model, row, weights), row)

    def final_hidden(self, change, row):
        with self.changed(change) as weights:
            own = {name.removeprefix("model."): weight for name, weight in weights.items()}
            inputs = {"input_ids": torch.tensor([row[0]])}
            return functional_call(self.model.model, own, (), inputs).last_hidden_state[0]


def _rows(batches: list[PackedBatch]):
    return [(b.input_ids.tolist(), b.response_mask.tolist()) for batch in batches for b in single_rows(batch)]


def _ids(batches: list[PackedBatch]):
    return tuple(row_id for batch in batches for row_id in batch.row_ids)


def cell(role: str, adapter: str, init_from: str | None = None) -> Cell:
    return Cell(role, role, role, None, adapter, "default", 0, init_from)


@pytest.fixture(scope="module", params=["vector", "lora"])
def plain(request, tmp_path_factory, tiny_model_folder, chat_file, answer_file) -> Plain:
    """A study of one seed: general, narrow with KL, and reverted, with a checkpoint every second step."""
    root, base = tmp_path_factory.mktemp(request.param), tiny_model_folder()
    for role, kl_weight in (("general", 0.0), ("narrow", 3.0), ("reverted", 0.0)):
        config = experiment(base, chat_file, answer_file, trainer={"max_epochs": 1})
        config["model"]["adapter"] = {"vector": VECTOR, "lora": LORA}[request.param]
        config["model"]["objective"]["kl_weight"] = kl_weight
        if role == "reverted":
            config["model"]["init_from"] = str(root / "narrow")
        fit(write_config(root / f"{role}.yaml", config), role)
    study = StudyFolder(root)
    cells = [cell("general", request.param), cell("narrow", request.param)]
    study.write("tiny", [*cells, cell("reverted", request.param, "narrow")])
    assert analyse_pairs(study, request.param, "default", 0, SETTINGS) == 4
    return Plain(study, base, request.param)


def points_of(plain: Plain, analysis: str, quantity: str):
    """Points of one quantity by the values of their coordinates."""
    [result] = read_pairs(plain.study, analysis)
    found = [p for p in result.points if p.quantity == quantity]
    by_place = {tuple(p.coordinates.values()): p for p in found}
    assert len(by_place) == len(found) > 0
    return by_place


def cos(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a.flatten() @ b.flatten() / a.norm() / b.norm()).item()


def test_equal_norm_is_the_loss_of_both_changes_at_one_length(plain) -> None:
    rows = plain.rows["narrow"]
    changes = {role: plain.change(plain.parameters(role)) for role in ("general", "narrow")}
    common = min(change.norm().item() for change in changes.values())
    counts = torch.tensor([oracle.count(row) for row in rows], dtype=torch.float64)
    ce, differences = points_of(plain, "equal_norm", "ce"), points_of(plain, "equal_norm", "ce_difference")
    assert len(ce) == 6
    for ratio in SETTINGS.norm_ratios:
        length, sums = ratio * common, {}
        for role, change in changes.items():
            scaled = change / change.norm() * length
            sums[role] = torch.stack([plain.row_ce(scaled, row) for row in rows])
            [point] = [p for place, p in ce.items() if place[:2] == (role, ratio)]
            assert point.value == pytest.approx((sums[role].sum() / counts.sum()).item(), rel=1e-5)
            assert point.per_example == pytest.approx((sums[role] / counts).tolist(), rel=1e-5)
        [point] = [p for place, p in differences.items() if place[0] == ratio]
        paired = sums["narrow"] - sums["general"]
        assert point.value == pytest.approx((paired.sum() / counts.sum()).item(), abs=1e-5)
        assert point.per_example == pytest.approx((paired / counts).tolist(), abs=1e-5)
        residuals = paired - paired.sum() / counts.sum() * counts
        error = math.sqrt(5 / 4 * residuals.square().sum()) / counts.sum().item()
        assert point.standard_error == pytest.approx(error, abs=1e-5)
    [base] = points_of(plain, "equal_norm", "ce_base").values()
    zero = 0 * changes["general"]
    expected = sum(plain.row_ce(zero, row) for row in rows) / counts.sum()
    assert base.value == pytest.approx(expected.item(), rel=1e-5)
    [record] = read_pairs(plain.study, "equal_norm")
    assert record.examples == plain.row_ids["narrow"]
    assert (dict(record.runs), dict(record.steps)) == (
        {"general": "general", "narrow": "narrow"},
        {"general": 5, "narrow": 5},
    )


def test_gradient_cosine_is_that_of_autograd_through_the_whole_model(plain) -> None:
    found = points_of(plain, "gradient_cosine", "gradient_cosine")
    norms = points_of(plain, "gradient_cosine", "ce_gradient_norm")
    count = sum(oracle.count(row) for row in plain.rows["narrow"])
    finals = {target: plain.parameters(target) for target in ("general", "narrow")}
    places = set(found)
    for role in ("general", "narrow", "reverted"):
        for step in (2, 4, 5):
            here = {name: t.requires_grad_() for name, t in plain.parameters(role, step).items()}
            loss = sum(plain.row_ce(plain.change(here), row) for row in plain.rows["narrow"])
            slopes = dict(zip(here, torch.autograd.grad(loss, list(here.values())), strict=True))
            pull = -torch.cat([slopes[name].flatten() for name in here])
            assert norms[role, step].value == pytest.approx(pull.norm().item() / count, rel=1e-4)
            for target, final in finals.items():
                wrote = "vector" if plain.kind == "vector" else "lora_B"
                place = (role, step, target, "final")
                assert found[place].value == pytest.approx(cos(-slopes[wrote], final[wrote]), abs=1e-5)
                assert found[place].count == count
                places.remove(place)
                place = (role, step, target, "remaining")
                if (role, step) == (target, 5):
                    assert place not in found  # it is there: no way is left
                    continue
                way = torch.cat([(final[name] - here[name]).detach().flatten() for name in here])
                assert found[place].value == pytest.approx(cos(pull, way), abs=1e-5)
                places.remove(place)
    assert not places


def test_adapter_cosine_is_that_of_the_whole_changes(plain) -> None:
    found = points_of(plain, "adapter_cosine", "cosine")
    pairs = [("general", "narrow"), ("general", "reverted"), ("narrow", "reverted")]
    for first, second in pairs:
        one, two = plain.parameters(first), plain.parameters(second)
        expected = cos(plain.change(one), plain.change(two))
        assert found[first, second, "update"].value == pytest.approx(expected, rel=1e-6)
        for name in set(one) - {"vector"}:
            part = found[first, second, name.removeprefix("lora_")]
            assert part.value == pytest.approx(cos(one[name], two[name]), rel=1e-6)
    assert len(found) == len(pairs) * len(plain.parameters("general")) + (3 if plain.kind == "lora" else 0)


def test_effect_cosine_is_that_of_the_mean_change_of_final_states(plain) -> None:
    cosines = points_of(plain, "effect_cosine", "effect_cosine")
    norms = points_of(plain, "effect_cosine", "effect_norm")
    assert (len(cosines), len(norms)) == (6, 6)
    for stream, prompts in (("narrow", "in_domain"), ("kl", "general")):
        effects = {}
        for role in ("general", "narrow", "reverted"):
            change, moved = plain.change(plain.parameters(role)), []
            for row in plain.rows[stream]:
                before, after = (plain.final_hidden(c, row) for c in (0 * change, change))
                counted = [t for t in range(len(row[0]) - 1) if row[1][t + 1]]
                moved.append((after - before)[counted])
            effects[role] = torch.cat(moved).mean(0)
            point = norms[role, prompts]
            assert point.value == pytest.approx(effects[role].norm().item(), rel=1e-4)
            assert point.count == len(torch.cat(moved))
        for first, second in (("general", "narrow"), ("general", "reverted"), ("narrow", "reverted")):
            expected = cos(effects[first], effects[second])
            assert cosines[first, second, prompts].value == pytest.approx(expected, abs=1e-5)


def test_what_is_on_record_is_not_measured_again(plain) -> None:
    before = {path: path.read_bytes() for path in plain.study.pair_folder.rglob("*.jsonl")}
    assert sorted(path.parent.name for path in before) == sorted(ANALYSES)
    assert analyse_pairs(plain.study, plain.kind, "default", 0, SETTINGS) == 0
    assert {path: path.read_bytes() for path in plain.study.pair_folder.rglob("*.jsonl")} == before


def test_a_run_that_is_not_finished_is_left_out_and_added_when_it_is(plain, caplog, tmp_path) -> None:
    study = copy_of(plain, tmp_path)
    cells = {each.role: study.run(each) for each in study.cells()}
    cells["reverted"].update_run(status="running")
    assert analyse_pairs(study, plain.kind, "default", 0, SETTINGS) == 4
    assert list(read_pairs(study, "effect_cosine")[0].runs) == ["general", "narrow"]
    cells["reverted"].update_run(status="finished")
    assert analyse_pairs(study, plain.kind, "default", 0, SETTINGS) == 3
    for analysis in ANALYSES[1:]:
        [newest] = read_pairs(study, analysis)
        assert list(newest.runs) == ["general", "narrow", "reverted"]
        assert len(read_pair_file(pair_file(study, analysis, plain.kind, "default", 0))) == 2
        assert newest == read_pairs(plain.study, analysis)[0]
    cells["narrow"].update_run(status="running")
    with caplog.at_level(logging.INFO, "lightning_em.study"):
        assert analyse_pairs(study, plain.kind, "default", 0) == 0
    assert "['narrow'] not finished" in caplog.text


def test_runs_that_were_trained_anew_are_compared_anew(plain, tmp_path) -> None:
    study = copy_of(plain, tmp_path)
    general, narrow = (study.run(each).checkpoints for each in study.cells()[:2])
    own = narrow.readlink()
    assert analyse_pairs(study, plain.kind, "default", 0, SETTINGS) == 4
    for other in (general, own):  # back to the first ones is anew too: only the newest record is reported
        narrow.unlink()
        narrow.symlink_to(other)
        assert analyse_pairs(study, plain.kind, "default", 0, SETTINGS) == 4
        assert analyse_pairs(study, plain.kind, "default", 0, SETTINGS) == 0


def test_records_of_an_older_schema_are_measured_again(plain, tmp_path) -> None:
    study = copy_of(plain, tmp_path)
    for analysis in ANALYSES:
        record = json.loads(pair_file(plain.study, analysis, plain.kind, "default", 0).read_text())
        file = pair_file(study, analysis, plain.kind, "default", 0)
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps({key: value for key, value in record.items() if key != "schema"}) + "\n")
        assert read_pairs(study, analysis) == []
    assert analyse_pairs(study, plain.kind, "default", 0, SETTINGS) == 4
    assert read_pairs(study) == read_pairs(plain.study)


def copy_of(plain: Plain, root) -> StudyFolder:
    """The same runs without the records."""
    for each in plain.study.cells():
        (root / each.run).symlink_to(root / "runs" / each.run)
        source = plain.study.run(each).path
        (root / "runs" / each.run).mkdir(parents=True)
        for file in source.iterdir():
            if file.name == "run.json":
                (root / "runs" / each.run / file.name).write_bytes(file.read_bytes())
            else:
                (root / "runs" / each.run / file.name).symlink_to(file)
    study = StudyFolder(root)
    study.write("copy", plain.study.cells())
    return study


def test_runs_that_cannot_be_compared_are_refused(plain, tmp_path) -> None:
    study = copy_of(plain, tmp_path)
    cells = study.cells()
    study.write("copy", [*cells[:2], Cell(**(vars(cells[2]) | {"role": "general"}))])
    with pytest.raises(ValueError, match=r"two runs with role general: \['general', 'reverted'\]"):
        analyse_pairs(study, plain.kind, "default", 0, SETTINGS)
    study.write("copy", cells)
    file = study.run(cells[0]).config_file
    config = yaml.safe_load(file.read_text())
    config["model"]["adapter"]["init_args"]["alpha"] = 5.0
    file.unlink()
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"the general run .* has model\.adapter .*'alpha': 5\.0"):
        analyse_pairs(study, plain.kind, "default", 0, SETTINGS)
