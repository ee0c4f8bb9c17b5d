"""What `pip install` gives: the configs, one version, a light import, and floors that name real modules."""

import ast
import configparser
import email
import importlib.metadata
import importlib.resources
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from setuptools import find_packages

import lightning_em

REPOSITORY = Path(__file__).parents[1]


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(REPOSITORY / "setup.cfg")
    return parser


def pyproject() -> dict:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text())


def run_python(code: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Build from a copy: setuptools leaves `build/` beside what it builds."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in ("lightning_em", "configs"):
        shutil.copytree(REPOSITORY / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        if (REPOSITORY / name).exists():
            shutil.copy(REPOSITORY / name, source / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*pip, "--wheel-dir", out, source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(next(out.glob("*.whl")))


def test_wheel_holds_every_config(wheel: zipfile.ZipFile) -> None:
    configs = {path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "configs").rglob("*.yaml")}
    assert configs
    prefix = "lightning_em/"
    shipped = {name.removeprefix(prefix) for name in wheel.namelist() if name.endswith(".yaml")}
    assert shipped == configs


def test_wheel_holds_every_module_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    modules = {
        path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "lightning_em").rglob("*.py")
    }
    assert {name for name in wheel.namelist() if name.endswith(".py")} == modules | {
        "lightning_em/configs/__init__.py"
    }
    assert "lightning_em/py.typed" in wheel.namelist()


def test_wheel_holds_the_table_of_advice(wheel: zipfile.ZipFile) -> None:
    table = "lightning_em/smollm2/advice.tsv"
    assert wheel.read(table) == (REPOSITORY / table).read_bytes()


def test_unpacked_wheel_finds_its_configs(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path)
    code = """
import importlib.resources
folder = importlib.resources.files("lightning_em.configs")
print(folder, len(list(folder.rglob("*.yaml"))))
"""
    folder, count = run_python(code, cwd=tmp_path).split()
    assert Path(folder) == tmp_path / "lightning_em" / "configs"
    assert int(count) == len(list((REPOSITORY / "configs").rglob("*.yaml")))


def test_editable_install_finds_the_configs() -> None:
    assert Path(str(importlib.resources.files("lightning_em.configs"))) == REPOSITORY / "configs"


def test_setup_cfg_names_every_package() -> None:
    named = set(setup_cfg()["options"]["packages"].split())
    assert named == {*find_packages(str(REPOSITORY), include=["lightning_em*"]), "lightning_em.configs"}


def test_version_has_one_source(wheel: zipfile.ZipFile) -> None:
    assert setup_cfg()["metadata"]["version"] == "attr: lightning_em.__version__"
    (metadata,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    message = email.message_from_bytes(wheel.read(metadata))
    assert message["Version"] == lightning_em.__version__ == importlib.metadata.version("lightning-em")


def test_constraints_pin_every_dependency() -> None:
    pinned = dict(line.split("==") for line in (REPOSITORY / "constraints.txt").read_text().splitlines()[1:])
    assert all(re.fullmatch(r"[0-9][0-9a-z.]*", version) for version in pinned.values())  # no +cpu, no path
    options = setup_cfg()
    lists = [options["options"]["install_requires"], *options["options.extras_require"].values()]
    lines = [line for block in lists for line in block.strip().splitlines() if not line.startswith("#")]
    required = {re.match(r"[\w-]+", line).group() for line in lines}
    named, needed = ({name.replace("_", "-").lower() for name in names} for names in (pinned, required))
    assert named >= needed


def imported_distributions(under: str = "", without: str = "") -> set[str]:
    """Distributions that the package's own code imports, by their names on the package index."""
    distributions = importlib.metadata.packages_distributions()
    found: set[str] = set()
    folder = REPOSITORY / "lightning_em"
    for file in (folder / under).rglob("*.py"):
        if without and file.is_relative_to(folder / without):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            tops = {name.partition(".")[0] for name in names} - {"lightning_em"}
            found |= {distributions[top][0].lower() for top in tops - sys.stdlib_module_names}
    return found


def required_by(lines: str) -> set[str]:
    return {re.match(r"[\w-]+", line).group().lower() for line in lines.strip().splitlines()}


def test_dependencies_are_what_the_package_imports() -> None:
    options = setup_cfg()
    held = {"jsonargparse"}  # Lightning's; named because version 5 breaks it
    required = required_by(options["options"]["install_requires"])
    assert imported_distributions(without="figures") | held == required
    extra = required_by(options["options.extras_require"]["figures"])
    assert extra <= imported_distributions("figures") <= required | extra


def test_import_loads_no_torch(tmp_path: Path) -> None:
    heavy = {"torch", "lightning", "transformers", "peft", "numpy"}
    loaded = run_python("import lightning_em, sys; print(*sys.modules)", cwd=tmp_path).split()
    assert "lightning_em" in loaded
    assert not heavy & set(loaded)


def test_records_and_runs_load_no_torch(tmp_path: Path) -> None:
    code = "import lightning_em.records, lightning_em.runs, sys; print(*sys.modules)"
    assert not {"torch", "lightning", "transformers", "peft"} & set(run_python(code, cwd=tmp_path).split())


def test_floors_name_every_module_and_only_modules() -> None:
    folder = REPOSITORY / "lightning_em"
    files = [*folder.glob("*.py"), *(package.parent for package in folder.glob("*/__init__.py"))]
    modules = {file.stem for file in files} - {"__init__"}
    contracts = pyproject()["tool"]["importlinter"]["contracts"]
    (floors,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    names = [name.strip() for floor in floors for name in re.split(r"[|:]", floor)]
    planned = {name.strip("()") for name in names if name.startswith("(")}
    assert (
        {name for name in names if not name.startswith("(")}
        <= modules
        <= {name.strip("()") for name in names}
    )
    assert not planned & modules, "built by now: take the parentheses off in pyproject.toml"
