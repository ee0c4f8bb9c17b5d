"""Records: typed, append-only JSON lines that survive a killed process. Never imports torch."""

import csv
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

SCHEMA_VERSION = 2
TABLE_COLUMNS = frozenset({
    "adapter", "arm", "count", "level", "measurement", "probe", "protocol", "quantity", "role", "run", "seed", "source",
    "standard_error", "step", "unit", "value", "world",
})  # fmt: skip
"""Columns of the tables of `analysis`, beside one column for each coordinate."""
Record = TypeVar("Record")


@dataclass(frozen=True)
class Quantity:
    """What a probe measures under one name. A name may be declared again with another unit or other coordinates.

    Attributes:
        name: Name of the quantity, e.g. `ce`.
        unit: Unit of its values, e.g. `nats_per_token`.
        coordinates: Names of the coordinates of each of its points, e.g. `("scale",)`.
        in_study: Checkpoints whose values the measurements of a study include: `last`, that of the probe's last record,
            `every` or `none`.
        mean_over: Coordinates that number repetitions, such as random draws. The measurements of a study hold the mean
            over them.
        of_checkpoint: Whether the checkpoint alone determines the value, whatever the settings and rows of the probe.

    Raises:
        ValueError: If a coordinate has the name of a column of the tables.
    """

    name: str
    unit: str
    coordinates: tuple[str, ...] = ()
    in_study: Literal["last", "every", "none"] = "last"
    mean_over: tuple[str, ...] = ()
    of_checkpoint: bool = False

    def __post_init__(self) -> None:
        if clash := sorted(TABLE_COLUMNS.intersection(self.coordinates)):
            raise ValueError(
                f"{self.name} has the coordinates {clash}, which are columns of every table: rename them."
            )

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> "Quantity":
        """Create a quantity from its fields in JSON, where tuples are lists."""
        own: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()
        }
        return cls(**own)


@dataclass(frozen=True)
class Point:
    """One measured value at one point of a probe's grid.

    Attributes:
        quantity: Name of the `Quantity`, e.g. `ce`.
        value: The measured value.
        unit: Unit of `value`, e.g. `nats_per_token`.
        coordinates: Coordinates on the grid, e.g. `{"scale": 0.5}`.
        standard_error: Standard error of `value`, in the same unit; None if unknown.
        count: Number of tokens, items or draws that `value` is computed from.
        per_example: The quantity for each example, in the order of `ProbeResult.examples`, or of `kl_examples` for a
            quantity of the KL data (named `kl...`). With these values, differences between points can be paired.
    """

    quantity: str
    value: float
    unit: str
    coordinates: Mapping[str, float | int | str] = field(default_factory=dict)
    standard_error: float | None = None
    count: int | None = None
    per_example: tuple[float, ...] | None = None

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> "Point":
        """Create a point from its fields in JSON."""
        values = fields.get("per_example")
        return cls(**{**fields, "per_example": None if values is None else tuple(values)})


@dataclass(frozen=True)
class ProbeResult:
    """All results of one probe at one checkpoint: one line of `probes/<probe>.jsonl`.

    Attributes:
        probe: Name of the probe.
        step: Number of optimizer steps taken when the checkpoint was written.
        settings: Settings of the probe; results with different settings are different measurements.
        points: The measured points.
        examples: Ids of the narrow rows that the probe reads, to which `per_example` values refer.
        kl_examples: Ids of the KL rows that the probe reads.
        base: Hash of the base model; see `base_sha256`.
        data: Hash of the run's training rows by stream, as token ids and masks.
        quantities: What the probe declares that it measures.
        grid: Settings that only choose the coordinates at which the probe measures.
    """

    probe: str
    step: int
    settings: Mapping[str, Any]
    points: tuple[Point, ...]
    examples: tuple[str, ...] = ()
    kl_examples: tuple[str, ...] = ()
    base: str | None = None
    data: Mapping[str, str] = field(default_factory=dict)
    schema: int = SCHEMA_VERSION
    quantities: tuple[Quantity, ...] = ()
    grid: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, line: str) -> "ProbeResult":
        """Create a result from one line.

        Raises:
            OtherSchemaError: If the line has another schema.
        """
        fields = json.loads(line)
        if (schema := fields["schema"]) != SCHEMA_VERSION:
            raise OtherSchemaError(f"schema {schema}, but this version reads schema {SCHEMA_VERSION}")
        points = tuple(map(Point.from_fields, fields.pop("points")))
        quantities = tuple(map(Quantity.from_fields, fields.pop("quantities", ())))
        for key in ("examples", "kl_examples", "grid"):
            fields[key] = tuple(fields.get(key, ()))
        return cls(points=points, quantities=quantities, **fields)

    @property
    def protocol(self) -> str:
        """Eight-digit hex hash of everything that the values depend on besides run and coordinates.

        Values with different protocols are not comparable. The hash covers the base model, the rows that the probe
        reads and its settings, without the grid: a coarser grid measures the same curve at fewer coordinates. A file
        named in a setting, such as a file of questions, enters by its name, not by its content.
        """
        settings = {key: value for key, value in self.settings.items() if key not in self.grid}
        fields = {"base": self.base, "settings": settings, "rows": [self.examples, self.kl_examples]}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:8]

    def to_json(self) -> str:
        """Return the result as one line of JSON, with keys in a fixed order.

        Raises:
            ValueError: If a value is NaN or infinite.
        """
        return json.dumps(asdict(self), allow_nan=False)


class OtherSchemaError(ValueError):
    """A record that another version of this package wrote."""


def declaration_of(point: Point, quantities: Sequence[Quantity], probe: str) -> Quantity:
    """Return the quantity that declares a point.

    Args:
        point: The measured point.
        quantities: What the probe declares that it measures.
        probe: Name of the probe, for the message.

    Raises:
        ValueError: If no quantity has the name, the unit and the coordinates of the point.
    """
    found = (point.quantity, point.unit, sorted(point.coordinates))
    declared = [(quantity.name, quantity.unit, sorted(quantity.coordinates)) for quantity in quantities]
    if found in declared:
        return quantities[declared.index(found)]
    alike: Sequence[object] = [each for each in declared if each[0] == point.quantity]
    known = alike or sorted({name for name, *_ in declared})
    raise ValueError(
        f"the probe {probe} measured the name, unit and coordinates {found}, but declares {known}: correct its "
        "`quantities`, or the point."
    )


def append_lines(path: Path, *lines: str) -> None:
    """Append all lines or, on an error, none, and flush them to disk.

    An incomplete last line, left by a killed process, is removed first.

    Raises:
        ValueError: If a line contains a newline.
        OSError: If the lines cannot be written.
    """
    if any("\n" in line for line in lines):
        raise ValueError("a record is one line; got a newline inside it.")
    path.parent.mkdir(parents=True, exist_ok=True)
    repair_tail(path)
    content = memoryview("".join(f"{line}\n" for line in lines).encode())
    # without a buffer, which would be written once more when the file is closed after an error
    with path.open("ab", buffering=0) as file:
        end = file.tell()
        try:
            while content:  # a disk that is nearly full takes a part of it
                content = content[file.write(content) :]
            os.fsync(file.fileno())
        except OSError:
            file.truncate(end)
            raise


def repair_tail(path: Path) -> None:
    """Remove an incomplete last line (without a newline), so that the next line does not continue it."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        size = file.seek(0, os.SEEK_END)
        if size == 0 or (file.seek(size - 1), file.read(1))[1] == b"\n":
            return
        position, block = size, 1 << 16
        while position > 0:
            start = max(0, position - block)
            file.seek(start)
            newline = file.read(position - start).rfind(b"\n")
            if newline >= 0:
                position = start + newline + 1
                break
            position = start
        if position < size:
            file.truncate(position)


def read_lines(path: Path) -> Iterator[str]:
    """Yield the complete lines of a record file, with newlines; skip an incomplete last line."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n") and line.strip():
                yield line.decode()


def read_metrics(path: Path) -> dict[int, dict[str, float]]:
    """Read metrics by step, in ascending order, and name.

    A resumed run may measure the metrics of its checkpoint again. The later value is kept; it may differ from the
    earlier one only by rounding, because the order of summation may differ.

    Raises:
        ValueError: If a step has two different values for one name.
    """
    table: dict[int, dict[str, float]] = {}
    for row in csv.DictReader(read_lines(path)):
        step, name, value = int(row["step"]), row["name"], float(row["value"])
        known = table.setdefault(step, {}).get(name, value)
        if not (math.isclose(known, value) or (math.isnan(known) and math.isnan(value))):
            raise ValueError(f"{path} has {name} twice at step {step}: {known!r} and {value!r}.")
        table[step][name] = value
    return dict(sorted(table.items()))


def read_results(path: Path) -> list[ProbeResult]:
    """Read all results of one probe file, in the order in which they were written.

    Raises:
        ValueError: If a line is damaged, or another version wrote it.
    """
    return list(parsed_lines(path, ProbeResult.from_json))


def parsed_lines(path: Path, parse: Callable[[str], Record]) -> Iterator[Record]:
    """Parse the complete lines of a record file.

    Raises:
        ValueError: If a line is damaged, or another version wrote it; the message contains its number.
    """
    for number, line in enumerate(read_lines(path), start=1):
        try:
            record = parse(line)
        except OtherSchemaError as error:
            raise ValueError(
                f"{path}: record {number} has {error}: move {path.parent} elsewhere and measure again with "
                f"`lightning-em probe {path.parents[1]} --config PROBING_FILE`."
            ) from None
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}: record {number} is damaged ({error!r}); remove the line and measure again."
            ) from error
        yield record
