"""Config files and options of a command line: options in a fixed order, and every key once. Never imports torch."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml

_YAML = (".yaml", ".yml")


def ordered(args: Sequence[str]) -> list[str]:
    """Sort options so that what sets a whole group never discards what was set within it.

    `--config` files come first, in their order. An option such as `--trainer FILE` or `--model.adapter.class_path NAME`
    comes before the options of the same group. All other options keep their places. jsonargparse 4.53 applies options
    from left to right, and a config file or a group discards what stands before it.

    Args:
        args: Command-line arguments after the subcommand.
    """
    configs: list[list[str]] = []
    options: list[list[str]] = []
    for option in _options(args):
        key = _key(option)
        if key == "config":
            configs.append(option)
            continue
        # An option that was given before has its place already; the last one counts, as everywhere.
        is_new = all(_key(other) != key for other in options)
        group = f"{key.removesuffix('.class_path')}."
        within = (i for i, other in enumerate(options) if _key(other).startswith(group))
        options.insert(next(within, len(options)) if key and is_new else len(options), option)
    return [word for option in (*configs, *options) for word in option]


def refuse_repeated_keys(args: Sequence[str]) -> None:
    """Check the YAML files that a command line names and those they refer to: every key occurs once in its mapping.

    Args:
        args: Command-line arguments.

    Raises:
        ValueError: If a key occurs twice; the message names the file and the lines.
    """
    seen: set[Path] = set()
    for option in _options(args):
        key, value = _key(option), _value(option)
        file = Path(value)
        if (key == "config" or value.endswith(_YAML)) and file.is_file():
            _check_file(file, seen)
        elif value[:1] in ("{", "["):
            _check_text(value, f"--{key}")


def load_yaml(text: str | bytes, name: str | Path) -> Any:
    """Parse YAML as `yaml.safe_load` does, but refuse a key that occurs twice in a mapping, of which it keeps the last.

    Args:
        text: YAML text.
        name: File or option that it comes from, for the message.

    Raises:
        ValueError: If a key occurs twice.
        yaml.YAMLError: If the text is not valid YAML.
    """
    _refuse_repeated(yaml.compose(text, Loader=yaml.SafeLoader), str(name), "")
    return yaml.safe_load(text)


def _options(args: Sequence[str]) -> list[list[str]]:
    """Split arguments into options, each with the words up to the next one."""
    options: list[list[str]] = []
    for word in args:
        if word.startswith("--") or not options:
            options.append([word])
        else:
            options[-1].append(word)
    return options


def _key(option: Sequence[str]) -> str:
    """Return the dotted key of an option; empty for a word that is not an option."""
    return option[0].removeprefix("--").partition("=")[0] if option[0].startswith("--") else ""


def _value(option: Sequence[str]) -> str:
    _, has_value, value = option[0].partition("=")
    return value if has_value else " ".join(option[1:])


def _check_file(file: Path, seen: set[Path]) -> None:
    if file.resolve() in seen:
        return
    seen.add(file.resolve())
    tree = _check_text(file.read_text(encoding="utf-8", errors="replace"), str(file))
    for value in _scalars(tree):
        if value.endswith(_YAML) and (file.parent / value).is_file():
            _check_file(file.parent / value, seen)


def _check_text(text: str, name: str) -> yaml.Node | None:
    try:
        tree: yaml.Node | None = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return None  # the parser reports it, with its place
    _refuse_repeated(tree, name, "")
    return tree


def _refuse_repeated(node: yaml.Node | None, name: str, prefix: str) -> None:
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_repeated(item, name, prefix)
    if not isinstance(node, yaml.MappingNode):
        return
    places = sorted((str(key.value), key.start_mark.line + 1) for key, _ in node.value)
    for key, found in groupby(places, key=lambda place: place[0]):
        lines = [str(line) for _, line in found]
        if len(lines) > 1:
            times = "twice" if len(lines) == 2 else f"{len(lines)} times"
            raise ValueError(
                f"{name}: the key {prefix}{key} occurs {times}, on lines {', '.join(lines[:-1])} and {lines[-1]}, and "
                "only the last one would count; write one of them, or merge them."
            )
    for key, value in node.value:
        _refuse_repeated(value, name, f"{prefix}{key.value}.")


def _scalars(node: yaml.Node | None) -> Iterator[str]:
    if isinstance(node, yaml.ScalarNode):
        yield node.value
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _scalars(item)
    elif isinstance(node, yaml.MappingNode):
        for _, value in node.value:
            yield from _scalars(value)
