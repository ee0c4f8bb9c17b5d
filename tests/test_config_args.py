"""The order of options does not matter, and a key that occurs twice in a YAML file is refused."""

import pytest
import yaml

from lightning_em import preflight
from lightning_em.__main__ import main
from lightning_em.config_args import load_yaml, ordered
from lightning_em.experiment import Experiment
from lightning_em.study.section import Section
from tests.fitting import VECTOR, experiment, write_config

LORA = "lightning_em.adapters.LoRA"


@pytest.fixture
def config(tmp_path, tiny_model_folder, chat_file, answer_file):
    content = experiment(tiny_model_folder(), chat_file, answer_file)
    content["model"]["adapter"] = "parts/vector.yaml"
    content["trainer"] = "parts/trainer.yaml"
    (tmp_path / "parts").mkdir()
    write_config(tmp_path / "parts" / "vector.yaml", VECTOR)
    write_config(tmp_path / "parts" / "trainer.yaml", {"max_epochs": 3, "accelerator": "cpu"})
    return write_config(tmp_path / "tiny.yaml", content)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("--a.b 1 --config x.yaml", "--config x.yaml --a.b 1"),
        ("--a=1 --config=x.yaml --c --config y.yaml", "--config=x.yaml --config y.yaml --a=1 --c"),
        ("--trainer.max_steps 3 --trainer t.yaml", "--trainer t.yaml --trainer.max_steps 3"),
        ("--m.init_args.rank=2 --b 1 --m.class_path=L", "--m.class_path=L --m.init_args.rank=2 --b 1"),
        ("--m.a.init_args.rank -2 --m.a L", "--m.a L --m.a.init_args.rank -2"),
        ("--a.b=1 --a.c=2 --a.b=3", "--a.b=1 --a.c=2 --a.b=3"),
        ("--t.list+=A --t.list.x=1 --t.list+=B", "--t.list+=A --t.list.x=1 --t.list+=B"),
        ("--ab.c=1 --a=x", "--ab.c=1 --a=x"),
        ("x.yaml --a 1", "x.yaml --a 1"),
        ("", ""),
    ],
)
def test_what_sets_a_group_comes_before_what_is_set_within_it(given, wanted):
    assert ordered(given.split()) == wanted.split()
    assert ordered(wanted.split()) == wanted.split()


def test_order_of_options_does_not_change_the_config(config):
    parts = str(config.parent / "parts")
    write_config(config.parent / "parts" / "other.yaml", {"max_epochs": 7, "accelerator": "cpu"})
    options = [
        ["--config", str(config)],
        ["--trainer", f"{parts}/other.yaml"],
        ["--trainer.max_steps", "9"],
        ["--model.adapter", LORA],
        ["--model.adapter.init_args.rank", "2"],
        ["--model.adapter.init_args.alpha", "4"],
        ["--model.adapter.init_args.target_modules", "[down_proj]"],
        ["--model.objective.kl_weight", "5"],
    ]
    forward = Experiment([word for option in options for word in option])
    backward = Experiment([word for option in reversed(options) for word in option])
    assert forward.config == backward.config
    assert forward.name == backward.name
    trainer, adapter = backward.config["trainer"], backward.config["model"]["adapter"]
    assert (trainer["max_epochs"], trainer["max_steps"]) == (7, 9)
    assert (adapter["class_path"], adapter["init_args"]["rank"]) == (LORA, 2)
    assert backward.config["model"]["objective"]["kl_weight"] == 5
    for args in (forward.args, backward.args):
        assert preflight.settings_of(args, "trainer")["max_steps"] == 9
        assert preflight.settings_of(args, "trainer")["max_epochs"] == 7


@pytest.mark.parametrize("way", ["class_path", "group", "file", "config"])
def test_a_new_class_gets_no_setting_of_the_class_that_it_replaces(config, way):
    """`momentum` and `lr` exist in both classes; jsonargparse alone keeps them."""
    parts = config.parent / "parts"
    old = {
        "class_path": "torch.optim.RMSprop",
        "init_args": {"lr": 0.05, "momentum": 0.7, "weight_decay": 0.3},
    }
    before = write_config(parts / "before.yaml", {"model": {"optimizer": old}})
    new = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5}}
    args = {
        "class_path": ["--model.optimizer.class_path", "torch.optim.SGD"],
        "group": ["--model.optimizer", "torch.optim.SGD"],
        "file": ["--model.optimizer", str(write_config(parts / "sgd.yaml", new))],
        "config": ["--config", str(write_config(parts / "after.yaml", {"model": {"optimizer": new}}))],
    }[way]
    lr = ["--model.optimizer.init_args.lr", "0.5"] if way in ("class_path", "group") else []
    found = Experiment(["--config", str(config), "--config", str(before), *args, *lr])
    optimizer = found.config["model"]["optimizer"]
    assert optimizer["class_path"] == "torch.optim.SGD"
    assert [optimizer["init_args"][key] for key in ("lr", "momentum", "weight_decay")] == [0.5, 0, 0]
    same = Experiment(
        ["--config", str(config), "--config", str(before), "--model.optimizer.init_args.lr", "0.5"]
    )
    assert same.config["model"]["optimizer"]["init_args"]["momentum"] == 0.7


def repeat(file, text: str) -> None:
    file.write_text(file.read_text() + text)


@pytest.mark.parametrize(
    ("file", "text", "told"),
    [
        (
            "tiny.yaml",
            "trainer:\n  accumulate_grad_batches: 3\n",
            r"tiny\.yaml: the key trainer occurs twice, on lines \d+ and \d+",
        ),
        (
            "tiny.yaml",
            "seed_everything: 1\nseed_everything: 2\nseed_everything: 3\n",
            r"the key seed_everything occurs 3 times, on lines \d+, \d+ and \d+",
        ),
        (
            "parts/trainer.yaml",
            "max_epochs: 9\n",
            r"parts/trainer\.yaml: the key max_epochs occurs twice, on lines 2 and 3",
        ),
        ("parts/vector.yaml", "init_args: {layer: 1}\n", r"vector\.yaml: the key init_args occurs twice"),
        ("parts/vector.yaml", "x: {y: [1, {z: 1, z: 1}]}\n", r"the key x\.y\.z occurs twice, on lines \d+"),
    ],
)
def test_key_that_stands_twice_is_refused_in_the_config_and_what_it_refers_to(config, file, text, told):
    Experiment.from_yaml(config)
    repeat(config.parent / file, text)
    with pytest.raises(ValueError, match=told):
        Experiment.from_yaml(config)


def test_key_that_stands_twice_is_refused_in_every_other_kind_of_file(config, capsys):
    twice = config.parent / "twice.yaml"
    twice.write_text("probes: []\nnum_examples: 4\nprobes: []\n")
    assert main(["data", "check", "x.jsonl", "--evaluation", str(twice)]) == 2
    assert main(["fit", "--config", str(config), "--trainer", str(twice)]) == 2
    assert main(["study", "status", str(twice)]) == 2
    told = capsys.readouterr().err
    assert told.count("twice.yaml: the key probes occurs twice, on lines 1 and 3") == 2
    with pytest.raises(ValueError, match="the key probes occurs twice"):
        Section.read(twice)
    with pytest.raises(ValueError, match=r"^--trainer: the key max_steps occurs twice, on lines 1 and 1"):
        Experiment(["--config", str(config), "--trainer", "{max_steps: 1, max_steps: 2}"])


def test_probing_file_with_a_key_twice_is_refused(tmp_path):
    from lightning_em.rebuild import load_probing
    from lightning_em.runs import RunFolder

    file = tmp_path / "probing.yaml"
    file.write_text("probes: []\nbatch_size: 4\nbatch_size: 8\n")
    with pytest.raises(ValueError, match=r"probing\.yaml: the key batch_size occurs twice, on lines 2 and 3"):
        load_probing(RunFolder(tmp_path), file)


def test_comment_that_names_a_file_is_not_a_reference(config):
    other = config.parent / "other.yaml"
    other.write_text("a: 1\na: 2\n")
    repeat(config, "# see other.yaml\n")
    Experiment.from_yaml(config)


@pytest.mark.parametrize(
    "text", ["a: 1\nb: {a: 1}\n", "- a: 1\n- a: 2\n", "a: &x {b: 1}\nc: {<<: *x, b: 2}\n", "", "7"]
)
def test_load_yaml_is_safe_load_where_every_key_stands_once(text):
    assert load_yaml(text, "x.yaml") == yaml.safe_load(text)
