"""Errors in a user's words: what was expected, what came, which key of which file. Never imports torch."""

import difflib
import importlib
import importlib.metadata
import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import yaml

_PARTS = ("adapters", "callbacks", "data", "losses", "probes")
_MAX_LINES = 12


class ConfigError(ValueError):
    """A config or a flag that cannot be used."""


def explain_parsing(message: str, words: Sequence[str], known_keys: Iterable[str]) -> str:
    """Shorten a message of jsonargparse to what its reader can act on.

    Args:
        message: As raised.
        words: The command line; its config files are searched for the key.
        known_keys: Every key that would have been accepted, dotted.
    """
    files = config_files(words)
    if broken := _broken_yaml(files):
        return broken
    parser_key = re.search(r'Parser key "([\w.]+)"', message)
    key = parser_key[1] if parser_key else "the command line"
    given = re.search(r"class_path '([\w.]+)'", message)
    if found := re.search(r"Importing '([\w.]+)' is not allowed, denied by the '([\w.*]+)'", message):
        package = found[1].split(".")[0] if found[2] == "*" else "NAME"
        return (
            f"{found[1]} may not be imported by a config{_place(given[1] if given else found[1], files)}: only "
            "classes of lightning_em, and some of lightning and torch, may. A package of yours that you trust is "
            f"allowed by --allow_import {package}."
        )
    if found := re.search(r"Option '([\w.]+)' is not accepted", message):
        place = _place(f"{key}.init_args.{found[1]}", files)
        near = _near(found[1], _parameters(given[1]) if given else ())
        return f"{given[1] if given else 'the class'} has no option {found[1]!r}{place}.{near}"
    if found := re.search(r"(?:does not accept option '|unrecognized arguments: --?)([\w.+-]+)", message):
        return _unknown_key(found[1].rstrip("+"), set(known_keys), files)
    if found := re.search(r"(?:dot import path string: |has no attribute ')([\w.]+)", message):
        name = given[1] if given else found[1]
        return f"{key}: there is no class {name}{_place(name, files)}.{_near(name.split('.')[-1], class_names())}"
    expected = list(dict.fromkeys(re.findall(r"Expected an? (?:<class '([\w.]+)'>|([^\n.]+))", message)))
    came = re.search(r"(?:Given value: |Got value: )([^\n]*)", message)
    if parser_key and expected and came:
        kinds = [
            (kind or text).replace("NoneType", "null").replace("builtins.", "") for kind, text in expected
        ]
        return f"{key} must be {' or '.join(kinds)}, got {came[1]}{_place(key, files)}."
    lines = [line for line in message.splitlines() if line.strip()]
    return "\n".join([*lines[:_MAX_LINES], *(["..."] if len(lines) > _MAX_LINES else [])])


def explain_missing_module(error: ModuleNotFoundError) -> str:
    """Which extra a missing package belongs to, or which package an allowed name was looked for in."""
    name = (error.name or "?").split(".")[0]
    for requirement in importlib.metadata.requires("lightning-em") or ():
        wanted = re.match(r"([\w.-]+).*extra == [\"']([\w-]+)", requirement)
        if wanted and wanted[1].replace("-", "_").lower() == name.lower():
            return f"this needs the package {name}: pip install 'lightning-em[{wanted[2]}]'."
    return f"there is no package {name} here; install it, or put its folder on PYTHONPATH."


def config_files(words: Sequence[str]) -> list[Path]:
    """The YAML files that a command line names, and those they refer to."""
    values = [word.partition("=")[2] if word.startswith("--") else word for word in words]
    pending = [Path(value) for value in values if value.endswith((".yaml", ".yml"))]
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
    """Names that a config can give a class by."""
    names: list[str] = []
    for part in _PARTS:
        names += importlib.import_module(f"lightning_em.{part}").__all__
    names += importlib.import_module("lightning.pytorch.callbacks").__all__
    return names


def _broken_yaml(files: Sequence[Path]) -> str | None:
    for file in files:
        try:
            yaml.safe_load(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            return f"{file} is not UTF-8 at byte {error.start + 1}."
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark
            place = f"{file}:{mark.line + 1}:{mark.column + 1}" if mark else str(file)
            if "tag:yaml.org,2002:python" in str(error):
                return f"{place}: a YAML tag that would run Python code; nothing of it was run. Name a class_path."
            return f"{place} is no YAML: {error.problem or error}."
        except yaml.YAMLError as error:
            return f"{file} is no YAML: {error}."
    return None


def _place(name: str, files: Sequence[Path]) -> str:
    """` (file:line)` of the last file with this dotted key, or this value; nothing if it came by a flag."""
    for file in reversed(files):
        node = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        for key, value, line in _leaves(node, ""):
            if key == name or name.endswith(f".{key}") or value == name:
                return f" ({file}:{line + 1})"
    return ""


def _leaves(node: yaml.Node | None, prefix: str) -> Iterator[tuple[str, str, int]]:
    """Dotted key, value if it is a plain one, and line of everything in a YAML tree."""
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
    """Options of a class that has been imported by now."""
    module, _, name = class_path.rpartition(".")
    try:
        owner = getattr(importlib.import_module(module), name)
        return [option for option in inspect.signature(owner).parameters if option != "self"]
    except (AttributeError, ImportError, TypeError, ValueError):
        return []


def _near(name: str, candidates: Iterable[str]) -> str:
    """A suggestion, or the whole list if nothing is alike and the list is short."""
    names = list(dict.fromkeys(candidates))
    by_lower = {candidate.lower(): candidate for candidate in names}
    if near := difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.6):
        return f" Did you mean {' or '.join(by_lower[match] for match in near)}?"
    return f" It has {', '.join(names)}." if 0 < len(names) <= _MAX_LINES else ""


def _unknown_key(key: str, known_keys: set[str], files: Sequence[Path]) -> str:
    """Name the first part of a dotted key that nobody knows, and what is like it at that place or elsewhere."""
    known = {
        ".".join(leaf.split(".")[:depth]) for leaf in known_keys for depth in range(1, leaf.count(".") + 2)
    }
    parts = key.split(".")
    depth = next((d for d in range(1, len(parts) + 1) if ".".join(parts[:d]) not in known), len(parts))
    wrong, parent = ".".join(parts[:depth]), "".join(f"{part}." for part in parts[: depth - 1])
    told = f"there is no key {wrong}{_place(wrong, files)}."
    siblings = [k.removeprefix(parent) for k in known if k.startswith(parent) and "." not in k[len(parent) :]]
    if near := difflib.get_close_matches(parts[depth - 1], siblings, n=1, cutoff=0.6):
        return f"{told} Did you mean {parent}{near[0]}?"
    if elsewhere := sorted(k for k in known if k.rsplit(".", 1)[-1] == parts[-1]):
        return f"{told} Did you mean {' or '.join(elsewhere[:3])}?"
    return (
        f"{told} {parent.rstrip('.') or 'A config'} has {', '.join(sorted(siblings))}." if siblings else told
    )
