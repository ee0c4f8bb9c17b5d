"""Read rows with the `datasets` package: Parquet, CSV, saved data sets, and data sets on the Hugging Face hub."""

import csv
import glob
import hashlib
import json
import logging
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

HUB_SCHEME = "hf://"
COLUMNS = ("messages", "question", "good", "bad", "topic", "subtopic", "id")
_HUB_ADDRESS = re.compile(
    r"hf://(?P<name>[\w.-]+/[\w.-]+?)(?:@(?P<revision>[\w./-]+))?(?::(?P<split>[\w.-]+))?"
)
# Data files and the card that assigns files to splits. No code and no pickles are downloaded.
_HUB_FILES = [f"**{suffix}" for suffix in (".md", ".parquet", ".csv", ".json", ".jsonl", ".gz", ".arrow")]
_SECONDS_TO_ANSWER = 5


class Table(NamedTuple):
    """Rows of a table before validation.

    Attributes:
        rows: One dictionary per row, with those of `COLUMNS` that the table has; None where a cell is empty.
        columns: Names of all columns of the table.
        sha256: Hash of the bytes of its data files, concatenated.
        revision: Commit of a data set on the hub; None for files.
    """

    rows: Sequence[dict[str, Any]]
    columns: tuple[str, ...]
    sha256: str
    revision: str | None = None


def is_table(file: Path) -> bool:
    """Tell whether `read_table` handles this file or folder."""
    return file.suffix in {".parquet", ".csv"} or is_saved_folder(file)


def is_saved_folder(folder: Path) -> bool:
    """Tell whether this folder was written by `save_to_disk`."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def read_table(path: str, file: Path | None) -> Table:
    """Read a whole table; columns other than `COLUMNS` are ignored.

    Args:
        path: Path as the user wrote it: a file, a `save_to_disk` folder or `hf://org/name[@revision][:split]`.
        file: Local file or folder; None for a data set on the hub.

    Raises:
        ValueError: If the table cannot be read or reached.
    """
    import datasets

    try:
        if file is None:
            return _read_hub(path)
        if file.is_dir():
            return _read_folder(path, file)
        return _read_file(file)
    except _ExplainedError:
        raise
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        cause = error.__cause__ or error  # datasets wraps the reader's error
        raise ValueError(f"{path} cannot be read: {type(cause).__name__}: {cause}") from error


class _ExplainedError(ValueError):
    """An error whose message is already complete."""


def _read_file(file: Path) -> Table:
    settings: dict[str, Any] = {}
    if file.suffix == ".csv":
        from datasets import Features, Value

        with file.open(newline="", encoding="utf-8-sig") as lines:
            header = next(csv.reader(lines), [])
        names = [name.strip() for name in header]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise _ExplainedError(f"{file}:1: the columns {repeated} occur twice; keep one of each.")
        # Read every cell as text: an answer "7" is not a number, and "None" or "NA" is not a missing value.
        features = Features({name: Value("string") for name in header})
        settings = {"features": features, "keep_default_na": False, "encoding": "utf-8-sig"}
    table = _build(file.suffix[1:], "train", data_files={"train": [glob.escape(str(file))]}, **settings)
    if file.suffix == ".csv":  # CSV cannot distinguish a missing cell from an empty one
        rows = [{key: value for key, value in row.items() if value != ""} for row in table.rows]
        table = table._replace(rows=rows)
    return table


def _read_folder(path: str, folder: Path) -> Table:
    from datasets import load_from_disk

    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        raise _ExplainedError(
            f"{path} holds the splits {sorted(splits)}; name one of them: {path}/{splits[0]}."
        )
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    files = [folder / entry["filename"] for entry in state["_data_files"]]
    if not files:  # datasets cannot load a data set that it saved without rows
        raise _ExplainedError(f"{path} has no rows.")
    return _as_table(load_from_disk(str(folder)), files)


def _read_hub(path: str) -> Table:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    match = _HUB_ADDRESS.fullmatch(path)
    if match is None:
        raise _ExplainedError(
            f"cannot read {path!r}; expected hf://org/name or hf://org/name@revision, optionally with :split."
        )
    name, revision = match["name"], match["revision"]
    revision_flag = f" --revision {revision}" if revision else ""
    try:
        folder = Path(
            snapshot_download(
                name,
                repo_type="dataset",
                revision=revision,
                allow_patterns=_HUB_FILES,
                etag_timeout=_SECONDS_TO_ANSWER,
            )
        )
    except RevisionNotFoundError as error:
        raise _ExplainedError(f"{path}: the data set has no revision {revision}.") from error
    except RepositoryNotFoundError as error:
        raise _ExplainedError(
            f"{path}: the hub has no data set of this name; a private one needs `hf auth login`."
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise _ExplainedError(
            f"{path} is not in the cache and could not be downloaded: {first_line} Without a network, use a file, "
            f"or fill the cache first: hf download --repo-type dataset {name}{revision_flag}"
        ) from error
    commit = folder.name
    if revision is None:
        logger.warning(
            "%s names no revision: write hf://%s@%s to read the same rows again", path, name, commit
        )
    return _build(str(folder), match["split"] or "train")._replace(revision=commit)


def _build(builder_name: str, split: str, **settings: Any) -> Table:
    """Read a split with a `datasets` builder, in a temporary cache, so that no stale copy can be reused."""
    from datasets import load_dataset_builder

    with tempfile.TemporaryDirectory() as cache, _no_progress_bars():
        builder = load_dataset_builder(builder_name, cache_dir=cache, **settings)
        files = builder.config.data_files
        if split not in files:
            raise _ExplainedError(
                f"there is no split {split!r}; expected one of {sorted(files)} after a colon."
            )
        builder.download_and_prepare()
        dataset = builder.as_dataset(split=split, in_memory=True)
        return _as_table(dataset, [Path(name) for name in files[split]])


def _as_table(dataset: "Dataset", files: Sequence[Path]) -> Table:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    # headers written by hand have spaces around the names
    dataset = dataset.rename_columns({name: name.strip() for name in dataset.column_names})
    columns = tuple(dataset.column_names)
    known = dataset.select_columns([name for name in COLUMNS if name in columns])
    return Table(list(known) if known.column_names else [], columns, digest.hexdigest())


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Hide the progress bars of table conversion, which takes seconds; downloads keep theirs."""
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
