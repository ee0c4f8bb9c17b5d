"""Sources: packages that provide base models and data files at addresses `scheme://...`. Never imports torch.

A package registers a source by an entry point that is named after the scheme, here in setup.cfg:

    [options.entry_points]
    lightning_em.sources =
        fruit = my_package.source:Fruit

`Fruit` subclasses `Source`. Once the package is installed, `model.base.path: fruit://small/model` and data paths such
as `fruit://small/data/train.jsonl` work wherever a local path does, and runs are named by `Fruit.identity`.
"""

import functools
import importlib.metadata
import os
import re
import sys
from abc import ABC, abstractmethod
from pathlib import Path

GROUP = "lightning_em.sources"
_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+)://")


class Source(ABC):
    """Base models and data files of one scheme.

    The class is made without arguments, in every process that meets an address of its scheme. Importing its module
    should be cheap and should not import torch: `identity` is called before any heavy import.
    """

    @abstractmethod
    def resolve(self, address: str) -> Path:
        """Return the local folder of a base model, or the local data file, of an address.

        What is missing on this machine is made, unpacked or fetched first, under `cache_dir()`, which may take a
        while. Several processes may ask for one address at once, so a file must appear complete or not at all (see
        `lightning_em.manifest`). A damaged file must be made again or refused.

        Args:
            address: Whole address, with its scheme.

        Raises:
            ValueError: If the address cannot be read, or what it names is not to be had; the message says what to do.
        """

    @abstractmethod
    def identity(self, address: str) -> str:
        """Return the address in a form that also fixes the content, such as an address with a hash in it.

        It replaces the address where runs are identified, so the content at equal identities must be equal on every
        machine. It is asked for often and before the content is needed: nothing is made, and no large file is read.

        Args:
            address: Whole address, with its scheme.

        Raises:
            ValueError: If the address cannot be read.
        """


def resolve(path: str, key: str) -> str:
    """Return the local path of an address; any other path as it is.

    Args:
        path: Address, or anything else.
        key: Config key that holds the path, for messages.

    Raises:
        ValueError: If no installed package provides the scheme, or the source cannot resolve the address.
    """
    scheme = _scheme(path)
    if scheme is None:
        return path
    if scheme not in schemes():
        known = ", ".join(schemes()) or "none (install lightning_em again: pip install -e .)"
        raise ValueError(
            f"{key} is {path!r}, but no installed package provides the scheme {scheme!r}; known schemes: {known}; "
            f"packages register one by an entry point of the group {GROUP}."
        )
    return str(_source(scheme).resolve(path))


def identity(path: str) -> str:
    """Return the identity of an address whose scheme is known; anything else as it is.

    Raises:
        ValueError: If the source cannot read the address.
    """
    scheme = _scheme(path)
    return path if scheme not in schemes() else _source(scheme).identity(path)


def is_address(path: str) -> bool:
    """Tell whether a path is an address `scheme://...`, of a known scheme or not."""
    return _scheme(path) is not None


def schemes() -> list[str]:
    """Return the schemes that installed packages provide."""
    return sorted(_registered(tuple(sys.path)))


def cache_dir() -> Path:
    """Return the cache folder: `LIGHTNING_EM_CACHE`, or `lightning_em` under `XDG_CACHE_HOME` or `~/.cache`."""
    if own := os.environ.get("LIGHTNING_EM_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(shared).expanduser() / "lightning_em"


def _scheme(path: str) -> str | None:
    match = _ADDRESS.match(path)
    return match[1] if match else None


# Reading the entry points of all installed packages takes tens of milliseconds, and a study asks hundreds of times.
@functools.cache
def _registered(search_path: tuple[str, ...]) -> dict[str, importlib.metadata.EntryPoint]:  # noqa: ARG001 (the key)
    """Entry points of the group by scheme.

    Args:
        search_path: `sys.path`, which decides what is installed: the key of the cache.

    Raises:
        ValueError: If two packages provide one scheme.
    """
    found: dict[str, importlib.metadata.EntryPoint] = {}
    for point in importlib.metadata.entry_points(group=GROUP):
        other = found.setdefault(point.name, point)
        if other.value != point.value:
            raise ValueError(
                f"two installed packages provide the scheme {point.name!r}: {other.value} and {point.value}; "
                "uninstall one of them."
            )
    return found


def _source(scheme: str) -> Source:
    return _made(_registered(tuple(sys.path))[scheme])


@functools.cache
def _made(point: importlib.metadata.EntryPoint) -> Source:
    try:
        made = point.load()()
    except (ImportError, AttributeError, TypeError) as error:
        raise ValueError(
            f"the entry point {point.name} = {point.value} of the group {GROUP} cannot be loaded: {error}; "
            "repair or uninstall that package."
        ) from error
    if not isinstance(made, Source):
        raise ValueError(
            f"the entry point {point.name} = {point.value} of the group {GROUP} must be a subclass of "
            f"lightning_em.sources.Source, got {made!r}; repair or uninstall that package."
        )
    return made
