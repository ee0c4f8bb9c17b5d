"""User-facing errors: what was expected, what was given, which key of which file. Never imports torch."""

import difflib
import importlib
import importlib.metadata
import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import yaml

EVERYWHERE = (
    "With every subcommand: --allow_import NAME lets configs name classes of your package NAME; --debug shows the "
    "traceback of an error."
)
_PARTS = ("adapters", "callbacks", "data", "losses", "probes")
_MAX_LINES = 12
_YAML = (".yaml", ".yml")


class ConfigError(ValueError):
    """A config or an option that cannot be used."""


def explain_parsing(message: str, args: Sequence[str], known_keys: Iterable[str]) -> str:
    """Shorten a jsonargparse message to the part that a user can act on.

    Args:
        message: Message of the parser's exception.
        args: Command-line arguments; their config files are searched for the key.
        known_keys: All accepted keys, dotted.
    """
    refusal = _Refusal(message, args, config_files(args))
    lines = [line for line in message.splitlines() if line.strip()]
    return (
        _wrong_file(refusal)
        or _wrong_class(refusal)
        or _wrong_key(refusal, set(known_keys))
        or _wrong_value(refusal)
        or "\n".join([*lines[:_MAX_LINES], *(["..."] if len(lines) > _MAX_LINES else [])])
    )


def explain_missing_module(error: ModuleNotFoundError) -> str:
    """Name the extra that provides a missing package, or say that an allowed package was not found."""
    if error.name is None:  # raised with a message of its own, not by the import system
        return str(error)
    name = error.name.split(".")[0]
    for requirement in importlib.metadata.requires("lightning-em") or ():
        wanted = re.match(r"([\w.-]+).*extra == [\"']([\w-]+)", requirement)
        if wanted and wanted[1].replace("-", "_").lower() == name.lower():
            return f"this needs the package {name}: pip install 'lightning-em[{wanted[2]}]'."
    return _no_package(name)


def explain_misconfiguration(message: str, args: Sequence[str]) -> str:
    """Name the trainer's key that a `MisconfigurationException` of Lightning is about.

    Args:
        message: Message of the exception.
        args: Command-line arguments; their config files are searched for the key.
    """
    text = " ".join(message.split())
    if "No supported gpu backend" in text:
        place = place_of("trainer.accelerator", args)
        return f"trainer.accelerator is gpu{place}, but there is no GPU here; set --trainer.accelerator cpu."
    named = re.search(r"`(?:Trainer\()?(\w+)|\b([a-z]+_\w+)", text)
    key = f"trainer.{named[1] or named[2]}" if named else ""
    return f"{key}{place_of(key, args)}: {text}" if key else text


def place_of(key: str, args: Sequence[str]) -> str:
    """Return ` (file:line)` of a dotted key in the config files of a command line; empty if an option sets it."""
    try:
        return _Refusal("", args, config_files(args)).place(key)
    except (yaml.YAMLError, UnicodeDecodeError):
        return ""  # the parser reports the error later


def config_files(args: Sequence[str]) -> list[Path]:
    """Return the YAML files that a command line names, and those they refer to."""
    values = [word.partition("=")[2] if word.startswith("--") else word for word in args]
    pending = [
        Path(name)
        for value in values
        for name in ([value] if value.endswith(_YAML) else re.findall(r"[\w./-]+\.ya?ml\b", value))
    ]
    files: list[Path] = []
    while pending:
        file = pending.pop(0)
        if file in files or not file.is_file():
            continue
        files.append(file)
        text = file.read_text(encoding="utf-8", errors="replace")
        pending += [file.parent / found for found in re.findall(r"[\w./-]+\.ya?ml\b", text)]
    return files


def class_names() -> list[str]:
    """Return the short class names that a config may use."""
    names: list[str] = []
    for part in _PARTS:
        names += importlib.import_module(f"lightning_em.{part}").__all__
    names += importlib.import_module("lightning.pytorch.callbacks").__all__
    return names


class _Refusal(NamedTuple):
    """A message of the parser, and the command line it is about."""

    message: str
    args: Sequence[str]
    files: Sequence[Path]

    @property
    def key(self) -> str:
        """Dotted key that the message is about; empty if it names none."""
        parts = re.split(r"Problem with given class_path '[^']*'", self.message)
        keys = [found[1] for part in parts if (found := re.search(r'Parser key "([\w.]+)"', part))]
        return ".init_args.".join(dict.fromkeys(keys))

    @property
    def class_path(self) -> str:
        """Class that the message is about; empty if it names none."""
        found = re.findall(r"class_path '([\w.]+)'", self.message) or re.findall(
            r"Namespace\(class_path='([\w.]+)'", self.message
        )
        return found[-1] if found else ""

    def place(self, name: str) -> str:
        """Return ` (file:line)` of the last file with this dotted key or value; empty if an option sets it."""
        if any(name in (key, value) for key, value in options_of(self.args)):
            return ""
        for file in reversed(self.files):
            for key, value, line in _leaves(_tree(file), ""):
                if key == name or name.endswith(f".{key}") or value == name:
                    return f" ({file}:{line + 1})"
        return ""


def _wrong_file(refusal: _Refusal) -> str | None:
    """Explain a config file that is missing, not YAML, empty, or a study file."""
    for key, value in options_of(refusal.args):
        if _is_missing(value, Path(), refusal):
            return f"--{key} names {value}, but there is no file {Path(value).absolute()}."
    if broken := _broken_yaml(refusal.files):
        return broken
    for file in refusal.files:
        for key, value, line in _leaves(_tree(file), ""):
            if _is_missing(value, file.parent, refusal):
                wanted = (file.parent / value).absolute()
                return f"{key} ({file}:{line + 1}) names {value}, but there is no file {wanted}."
    for key, value in options_of(refusal.args):
        is_read = key == "config" and Path(value) in refusal.files
        if is_read and {"arms", "like"} & {key for key, _, _ in _leaves(_tree(Path(value)), "")}:
            return f"{value} is a study: lightning-em study run {value} (or submit --study {value})."
    return None


def _is_missing(value: str, folder: Path, refusal: _Refusal) -> bool:
    """Tell whether a value in the parser's message is the name of a missing YAML file."""
    return value.endswith(_YAML) and value in refusal.message and not (folder / value).exists()


def _broken_yaml(files: Sequence[Path]) -> str | None:
    for file in files:
        try:
            if _tree(file) is None:
                return f"{file} is empty; write its keys, or leave the file out."
            yaml.safe_load(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            return f"{file} is not UTF-8 at byte {error.start + 1}."
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark
            place = f"{file}:{mark.line + 1}:{mark.column + 1}" if mark else str(file)
            if "tag:yaml.org,2002:python" in str(error):
                return f"{place}: a YAML tag that would run Python code; it was not run. Use a class_path instead."
            return f"{place} is not valid YAML: {error.problem or error}."
        except yaml.YAMLError as error:
            return f"{file} is not valid YAML: {error}."
    return None


def _wrong_class(refusal: _Refusal) -> str | None:
    """Explain a class that may not be imported, does not exist, or lacks the given option."""
    message, given = refusal.message, refusal.class_path
    if found := re.search(r"Importing '([\w.]+)' is not allowed, denied by the '([\w.*]+)'", message):
        package = found[1].split(".")[0] if found[2] == "*" else "NAME"
        return (
            f"{found[1]} may not be imported by a config{refusal.place(given or found[1])}: only "
            "classes of lightning_em, and some of lightning and torch, are allowed. To allow a package that you "
            f"trust, add --allow_import {package}."
        )
    if found := re.search(r"Option '([\w.]+)' is not accepted", message):
        place = refusal.place(f"{refusal.key}.init_args.{found[1]}")
        near = _near(found[1], _parameters(given) if given else ())
        return f"{given or 'the class'} has no option {found[1]!r}{place}.{near}"
    if given and (found := re.search(r"following arguments are required: ([\w, ]+)", message)):
        options = found[1].split(", ")
        keys = " and ".join(f"{refusal.key}.init_args.{option}" for option in options)
        return f"{given}{refusal.place(given)} needs {' and '.join(options)}: set {keys}."
    if (found := re.search(r"No module named '(\w+)'", message)) and given:
        return f"{refusal.key} is {given}{refusal.place(given)}, but {_no_package(found[1])}"
    if found := re.search(r"(?:import path string: |has no attribute '|No module named ')([\w.]+)", message):
        name = given or found[1]
        near = _near(name.split(".")[-1], class_names())
        return f"{refusal.key}: there is no class {name}{refusal.place(name)}.{near}"
    return None


def _wrong_key(refusal: _Refusal, known_keys: set[str]) -> str | None:
    """Explain an unknown key, an argument without option, or missing keys."""
    if found := re.search(r"unrecognized arguments: ([^\s-]\S*)", refusal.message):
        meant = f"write --config {found[1]}" if found[1].endswith(_YAML) else "every value needs its --KEY"
        return f"unexpected argument {found[1]}; {meant}."
    # with --print_config, jsonargparse 4.53 names the group and the key below it apart
    beginnings = r"(?:Group '([\w.]+)' does not accept option '|accept option '|unrecognized arguments: --?)"
    if found := re.search(rf"{beginnings}([\w.+-]+)", refusal.message):
        # a file of one group, as for `probe --config`, has the group's keys without its name
        group = (
            f"{found[1]}." if found[1] and any(key.startswith(f"{found[1]}.") for key in known_keys) else ""
        )
        return _unknown_key(f"{group}{found[2].rstrip('+')}", known_keys, refusal)
    if found := re.search(r"following arguments are required: (.+)", refusal.message):
        flags = ", ".join(f"--{key.strip().partition('.')[2]}" for key in found[1].split(","))
        given = " and ".join(value for key, value in options_of(refusal.args) if key == "config")
        start = f"{given} is incomplete: add" if given else "give --config configs/experiment/x.yaml, or"
        return f"{start} {flags}."
    return None


def _wrong_value(refusal: _Refusal) -> str | None:
    """Explain a value of the wrong type."""
    expected = re.findall(
        r"Expected an? (?:<class '([\w.]+)'>|typing\.Literal\[([^\]]+)\]|(?!path but)([^\n.]+))",
        refusal.message,
    )
    came = re.search(r"(?:Given value: |Got value: )([^\n]*)", refusal.message)
    if not (refusal.key and expected and came):
        return None
    kinds = [
        f"one of {choices.replace(chr(39), '')}"
        if choices
        else (kind or text).replace("NoneType", "null").replace("builtins.", "")
        for kind, choices, text in dict.fromkeys(expected)
    ]
    return f"{refusal.key} must be {' or '.join(kinds)}, got {came[1]}{refusal.place(refusal.key)}."


def _no_package(name: str) -> str:
    return (
        f"there is no package {name} here; install it, or put its folder on PYTHONPATH (`PYTHONPATH=. lightning-em "
        "...` for one in the current folder)."
    )


def options_of(args: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield key and value of every `--key value` and `--key=value`."""
    for word, following in pairwise([*args, ""]):
        if word.startswith("--"):
            key, has_value, value = word.removeprefix("--").partition("=")
            yield key, value if has_value else following


def _tree(file: Path) -> yaml.Node | None:
    node: yaml.Node | None = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    return node


def _leaves(node: yaml.Node | None, prefix: str) -> Iterator[tuple[str, str, int]]:
    """Yield the dotted key, the value if it is a scalar, and the line of every node in a YAML tree."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            dotted = f"{prefix}{key.value}"
            yield dotted, value.value if isinstance(value, yaml.ScalarNode) else "", key.start_mark.line
            yield from _leaves(value, f"{dotted}.")
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            if isinstance(item, yaml.ScalarNode):
                yield "", item.value, item.start_mark.line
            yield from _leaves(item, prefix)


def _parameters(class_path: str) -> list[str]:
    """Return the options of a class that the parser has already imported."""
    module, _, name = class_path.rpartition(".")
    try:
        owner = getattr(importlib.import_module(module), name)
        return [option for option in inspect.signature(owner).parameters if option != "self"]
    except (AttributeError, ImportError, TypeError, ValueError):
        return []


def _near(name: str, candidates: Iterable[str]) -> str:
    """Return a suggestion, or all candidates if none is similar and there are few."""
    names = list(dict.fromkeys(candidates))
    by_lower = {candidate.lower(): candidate for candidate in names}
    if name.lower() in by_lower:  # only the case is wrong
        return f" Did you mean {by_lower[name.lower()]}?"
    if near := difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.6):
        return f" Did you mean {' or '.join(by_lower[match] for match in near)}?"
    return f" It has {', '.join(names)}." if 0 < len(names) <= _MAX_LINES else ""


def _unknown_key(key: str, known_keys: set[str], refusal: _Refusal) -> str:
    """Name the first unknown part of a dotted key, and suggest a similar key at that level or elsewhere."""
    known = {
        ".".join(leaf.split(".")[:depth]) for leaf in known_keys for depth in range(1, leaf.count(".") + 2)
    }
    parts = key.split(".")
    depth = next((d for d in range(1, len(parts) + 1) if ".".join(parts[:d]) not in known), len(parts))
    wrong, parent = ".".join(parts[:depth]), "".join(f"{part}." for part in parts[: depth - 1])
    told = f"there is no key {wrong}{refusal.place(wrong)}."
    siblings = [k.removeprefix(parent) for k in known if k.startswith(parent) and "." not in k[len(parent) :]]
    if near := difflib.get_close_matches(parts[depth - 1], siblings, n=1, cutoff=0.6):
        return f"{told} Did you mean {parent}{near[0]}?"
    if elsewhere := sorted(k for k in known if k.rsplit(".", 1)[-1] == parts[-1]):
        return f"{told} Did you mean {' or '.join(elsewhere[:3])}?"
    return (
        f"{told} {parent.rstrip('.') or 'A config'} has {', '.join(sorted(siblings))}." if siblings else told
    )
