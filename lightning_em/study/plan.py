"""Plan a study: its file becomes one command line per arm, adapter, world and seed. Reading imports no torch."""

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_em import sources
from lightning_em.analysis.cells import DEFAULT_WORLD, MOST_SEEDS, Cell, StudyFolder
from lightning_em.analysis.claims.rules import Rules
from lightning_em.errors import config_files
from lightning_em.preflight import refuse_missing_kl_data
from lightning_em.study.arms import NAME, Arm, parents_first, read_arms, rules_of, worlds_of
from lightning_em.study.section import Section, refuse_unknown

if TYPE_CHECKING:
    from lightning_em.experiment import Experiment

STUDY_KEYS = (
    "like", "name", "experiment", "seeds", "worlds", "fill", "set", "adapters", "arms", "probing", "seconds_per_run",
    "claims", "roles",
)  # fmt: skip
_PLACE = re.compile(r"\{(\w+)\}")
_OWN_PLACES = ("seed", "world", "adapter", "level")
_BESIDE_THE_STUDY = ("./", "../")
_NOT_IDENTITY = ("--allow_import=", "--run.")
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://[^\s\"'{}\[\],]+")


@dataclass(frozen=True)
class PlannedRun:
    """A run of a study.

    Attributes:
        cell: Name, arm, role, adapter, world and seed of the run.
        args: Command-line arguments after `lightning-em fit`.
    """

    cell: Cell
    args: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name of the run, which is that of its folder in the study's root."""
        return self.cell.run


@dataclass(frozen=True)
class Study:
    """The plan that a study file describes.

    Attributes:
        name: Name of the study.
        file: File that the plan was read from.
        root: Folder of the runs.
        runs: All runs; each comes after the run it starts from.
        seconds_per_run: Estimated duration of one run, for the budget until a run is finished.
        rules: Settings of the claims.
    """

    name: str
    file: Path
    root: Path
    runs: tuple[PlannedRun, ...]
    seconds_per_run: float | None
    rules: Rules

    def chosen(
        self,
        seeds: Collection[int] | None = None,
        arms: Collection[str] | None = None,
        adapters: Collection[str] | None = None,
    ) -> list[PlannedRun]:
        """Select the runs of some seeds, arms and adapters, and the runs they start from.

        Args:
            seeds: Seeds to select; None for all.
            arms: Arms to select; None for all.
            adapters: Adapters to select; None for all.

        Raises:
            ValueError: If the study has no such seed, arm or adapter, or no run matches all three.
        """
        for flag, given in (("seeds", seeds), ("arms", arms), ("adapters", adapters)):
            known = dict.fromkeys(str(getattr(run.cell, flag.removesuffix("s"))) for run in self.runs)
            for name in given or ():
                refuse_unknown(str(name), known, f"--{flag}: {self.file} has no")
        wanted: set[str] = set()
        # In reverse order each run comes before the one it starts from, so that chains of parents are followed too.
        for run in reversed(self.runs):
            cell = run.cell
            if cell.run in wanted or (
                (seeds is None or cell.seed in seeds)
                and (arms is None or cell.arm in arms)
                and (adapters is None or cell.adapter in adapters)
            ):
                wanted |= {cell.run} | ({cell.init_from} if cell.init_from else set())
        if not wanted:
            asked = {"--seeds": seeds, "--arms": arms, "--adapters": adapters}
            words = " ".join(
                f"{flag} {' '.join(map(str, given))}" for flag, given in asked.items() if given is not None
            )
            raise ValueError(f"no run of {self.file} has {words} together; name fewer of them.")
        return [run for run in self.runs if run.name in wanted]


def resolve(run: PlannedRun) -> tuple[PlannedRun, "Experiment"]:
    """Resolve the config of a run, as `lightning-em fit` does. Needs torch, but no weights and no data.

    Returns:
        The run with its identity, and its experiment.

    Raises:
        ValueError: If the options of the run are not valid; the message names the run.
    """
    from lightning_em.experiment import Experiment

    try:
        experiment = Experiment(run.args)
        refuse_missing_kl_data(experiment.config)
    except ValueError as error:
        raise ValueError(f"{run.name}: {error}") from error
    identity = {key: experiment.identity[key] for key in ("name", "config")}
    return replace(run, cell=replace(run.cell, identity=identity)), experiment


def with_identities(study: Study, names: Collection[str]) -> Study:
    """Add identities to the runs with these names, and to all runs whose identity is in study.json.

    An identity in study.json is used as it is, unless the options or files of the run have changed since.
    """
    known = StudyFolder(study.root).identities()

    def with_identity(run: PlannedRun) -> PlannedRun:
        planned_from, identity = known.get(run.name, (None, None))
        if identity is not None and planned_from == run.cell.planned_from:
            return replace(run, cell=replace(run.cell, identity=identity))
        return resolve(run)[0] if run.name in names else run

    return replace(study, runs=tuple(with_identity(run) for run in study.runs))


class _Place(NamedTuple):
    """Coordinates of a run in the study, besides its arm."""

    adapter: str
    world: str
    seed: int


def read_study(file: str | Path, root: str | Path | None = None) -> Study:
    """Read a study file and plan its runs.

    Args:
        file: YAML file, as in configs/study.
        root: Folder of the runs; `runs/study-<name>` if not given.

    Raises:
        ValueError: If a setting is not valid; the message names file and key.
    """
    top = _whole(Path(file))
    top.only(STUDY_KEYS)
    name, experiment = _named(top, "name"), top.text("experiment") or top.refuse("experiment", "a file")
    top.path(experiment, "experiment")
    arms = read_arms(top)
    seeds = sorted({seed for arm in arms.values() for seed in arm.seeds})
    if len(seeds) > MOST_SEEDS:
        raise ValueError(
            f"{file}: seeds, with those of arms, must be at most {MOST_SEEDS}, as the exact test in `study report` "
            f"takes no more; got {len(seeds)}: {seeds}."
        )
    planner = _Planner(top, Path(root or f"runs/study-{name}"), arms)
    runs = tuple(
        planner.run(arm, _Place(adapter, world, seed))
        for seed in seeds
        for world in worlds_of(top)
        for arm in parents_first(top, arms)
        for adapter in arm.adapters
        if world in arm.worlds and seed in arm.seeds
    )
    return Study(name, Path(file), planner.root, runs, top.number("seconds_per_run"), rules_of(top))


class _Planner:
    """Builds the command line of each run.

    Args:
        top: The whole study file.
        root: Folder of the runs.
        arms: Arms by name.
    """

    def __init__(self, top: Section, root: Path, arms: Mapping[str, Arm]) -> None:
        self.top, self.root, self.arms = top, root, arms
        self.worlds, self.adapters = worlds_of(top), top.sections("adapters")
        names = top.section("fill")
        for name in _OWN_PLACES:
            if name in names:
                names.refuse(name, "under another name, as each run fills this place itself")
        self.names = {name: names.text(name) or names.refuse(name, "a text") for name in names.content}

    def run(self, arm: Arm, place: _Place) -> PlannedRun:
        """Plan one run of an arm."""
        own = arm.section.section("per_adapter").section(place.adapter)
        # Later layers override earlier ones.
        layers = [self.top, self.adapters[place.adapter], arm.section, own]
        level = next((s.number("level") for s in (own, arm.section) if "level" in s), None)
        parent = self.arms[arm.init_from] if arm.init_from else None
        if parent and not (
            place.adapter in parent.adapters and place.world in parent.worlds and place.seed in parent.seeds
        ):
            arm.section.refuse(
                "init_from",
                f"an arm that is run with adapter {place.adapter}, world {place.world} and seed {place.seed} too",
            )
        cell = Cell(
            run=run_name(arm.name, place.adapter, place.world, place.seed),
            arm=arm.name,
            role=arm.section.content["role"],
            level=level,
            adapter=place.adapter,
            world=place.world,
            seed=place.seed,
            init_from=run_name(parent.name, *place) if parent else None,
        )
        args = tuple(self._args(cell, layers))
        return PlannedRun(replace(cell, planned_from=_planned_from(args)), args)

    def _args(self, cell: Cell, layers: list[Section]) -> Iterable[str]:
        experiment = str(self.top.content["experiment"])
        yield f"--config={self.top.path(experiment, 'experiment')}"
        for layer in layers[1:]:
            for name in layer.texts("config") or ():
                yield f"--config={layer.path(name, 'config')}"
        probing = [
            f"{layer.path(str(file), 'probing')}" for layer in layers if (file := layer.text("probing"))
        ]
        if probing:
            yield f"--probing={probing[-1]}"
        values: dict[str, str] = {}
        for layer in layers:
            inner = layer.section("set")
            values |= {key: self._value(inner, key, cell) for key in inner.content}
        yield from (f"--{key}={value}" for key, value in values.items())
        if cell.init_from:
            yield f"--model.init_from={self.root / cell.init_from}"
        yield f"--run.root={self.root}"
        yield f"--run.name={cell.run}"

    def _value(self, section: Section, key: str, cell: Cell) -> str:
        """A value as text for a command-line option, with its {placeholders} filled in."""
        places = {"seed": str(cell.seed), "world": self.worlds[cell.world], "adapter": cell.adapter}
        if cell.level is not None:
            places["level"] = f"{cell.level:.15g}"  # the six digits of `:g` could change the value
        names = {
            name: _filled(text, places, self.top.section("fill"), name) for name, text in self.names.items()
        }

        def fill(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {name: fill(each) for name, each in value.items()}
            if isinstance(value, list):
                return [fill(each) for each in value]
            if not isinstance(value, str):
                return value
            filled = _filled(value, names | places, section, key)
            beside = filled.startswith(_BESIDE_THE_STUDY)
            return str(section.path(filled, key, or_folder=True)) if beside else filled

        filled = fill(section.content[key])
        try:
            return filled if isinstance(filled, str) else json.dumps(filled)
        except TypeError:
            section.refuse(key, "a text, a number, a truth value, or lists and mappings of them")


def _planned_from(args: Sequence[str]) -> str:
    """Hash of the inputs of a run's config: its options, the files they name, and what their addresses mean."""
    own = [arg for arg in args if not arg.startswith(_NOT_IDENTITY)]
    texts = [*own, *(file.read_text(encoding="utf-8") for file in config_files(own))]
    identities = {_identity(address) for text in texts for address in _ADDRESS.findall(text)}
    return hashlib.sha256("\0".join([*texts, *sorted(identities)]).encode()).hexdigest()


def _identity(address: str) -> str:
    try:
        return sources.identity(address)
    except ValueError:  # the address is in a comment, or it is not valid and the run will refuse it
        return address


def _filled(text: str, places: Mapping[str, str], section: Section, key: str) -> str:
    """Fill in the {placeholders} of a text.

    Raises:
        ValueError: If a placeholder has no value.
    """
    for name in _PLACE.findall(text):
        if name not in places:
            section.refuse(key, f"a text whose places are of {{{'}, {'.join(places)}}}")
    return _PLACE.sub(lambda match: places[match[1]], text)


def run_name(arm: str, adapter: str, world: str, seed: int) -> str:
    """Name of a run, and of its folder in the study's root."""
    return f"{arm}-{adapter}-{'' if world == DEFAULT_WORLD else f'{world}-'}seed{seed}"


def _whole(file: Path, above: tuple[Path, ...] = ()) -> Section:
    """Read a study file and merge it over the file that its `like` key names.

    Args:
        file: File to read.
        above: Files that are merged over this one, to detect a cycle.

    Raises:
        ValueError: If the `like` keys form a cycle.
    """
    top = Section.read(file)
    like = top.text("like")
    if like is None:
        return top
    if Path(like).name != like:
        top.refuse("like", "a file in the same folder, so that paths mean the same in both")
    under = file.parent / like
    if top.path(like, "like") in (file.resolve(), *above):
        top.refuse("like", "a file that is not like this one itself")
    return Section(file, "", _merged(_whole(under, (*above, file.resolve())).content, top.content))


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    both = [key for key in over if isinstance(over[key], Mapping) and isinstance(under.get(key), Mapping)]
    return {**under, **over, **{key: _merged(under[key], over[key]) for key in both}}


def _named(top: Section, key: str) -> str:
    name = top.text(key) or ""
    return name if NAME.fullmatch(name.replace("-", "_")) else top.refuse(key, "letters, digits, . _ and -")
