"""Subcommands that read and write adapters of other programs: `import` and `export`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from lightning_em.subcommands.data import AnswerKind
from lightning_em.subcommands.wiring import add_subcommand, console, in_flags

if TYPE_CHECKING:
    from lightning_em.exchange import ExportFormat, PeftType

# The values of lightning_em.exchange, repeated since importing it loads torch; a test compares them.
FORMATS = ("peft", "safetensors", "authors", "gguf")
PEFT_TYPES = ("beft", "lora_bias")
# Replacements for config keys in error messages, since `import` has options instead.
_FLAGS = {
    "model.base.path": "--base",
    "model.base.revision": "--revision",
    "model.base.dtype": "--dtype",
    "data.narrow.path": "--narrow",
    "data.kl.path": "--kl",
    ", set its `path`": "",
}
Precision = Literal["float32", "bfloat16", "float16", "float64"]


def add(subcommands: Any) -> None:
    """Add the subcommands of this family to the parser."""
    take = add_subcommand(
        subcommands,
        "import",
        import_adapter,
        "make a run of a released steering vector or a PEFT folder, for the probes",
    )
    take.add_argument(
        "source", help="steering_vector.pt, a PEFT folder, or a folder with checkpoint-N of them"
    )
    take.add_argument("--base", required=True, help="the model it was trained on: hub id or folder")
    take.add_argument("--revision", help="of a hub model")
    take.add_argument(
        "--dtype", default="float32", choices=get_args(Precision), help="of the base's frozen weights"
    )
    take.add_argument("--name", help="of the run; default: the source's name")
    take.add_argument("--root", default="runs", help="folder of the runs")
    take.add_argument(
        "--step",
        type=int,
        help="optimizer steps of the final adapter; default: the folder's, or one past its checkpoints",
    )
    take.add_argument("--data", help="YAML with rows for the probes, as configs/data/*.yaml")
    take.add_argument("--narrow", help="file of narrow rows for the probes")
    take.add_argument("--narrow_answer", choices=get_args(AnswerKind), help="which answer of its rows counts")
    take.add_argument("--kl", help="file of parallel rows for the probes")
    take.add_argument("--kl_answer", choices=get_args(AnswerKind), help="which answer of its rows counts")
    take.add_argument("--allow_zero_adapter", action="store_true", help="also one that changes no logit")
    give = add_subcommand(
        subcommands, "export", export_adapter, "write a run's adapter for PEFT, transformers or llama.cpp"
    )
    give.add_argument("run", help="runs/x for the newest checkpoint, runs/x@step-40 for another")
    give.add_argument(
        "--format",
        dest="file_format",
        required=True,
        choices=FORMATS,
        help="peft: a PEFT folder; safetensors: tensors; authors: the released .pt; gguf: llama.cpp",
    )
    give.add_argument("--output", required=True, help="the folder to make")
    give.add_argument(
        "--peft_type",
        default="beft",
        choices=PEFT_TYPES,
        help="a vector for PEFT: beft (peft >= 0.20), or lora_bias (peft >= 0.14; keeps alpha apart)",
    )


def import_adapter(
    source: str,
    base: str,
    revision: str | None = None,
    dtype: Precision = "float32",
    name: str | None = None,
    root: str = "runs",
    step: int | None = None,
    allow_zero_adapter: bool = False,
    **data: str | None,
) -> None:
    """Make a run folder from an adapter that another program has trained.

    Args:
        source: File or folder of the adapter.
        base: Hub id or folder of the model that the adapter was trained on.
        revision: Revision of a hub model.
        dtype: Precision of the base model.
        name: Name of the run; that of the source if not given.
        root: Folder of the runs.
        step: Number of optimizer steps after which the final adapter was saved.
        allow_zero_adapter: Whether to accept an adapter that changes no logit.
        data: Rows for the probes: `data` (a YAML part), `narrow`, `narrow_answer`, `kl`, `kl_answer`.
    """
    from lightning_em.exchange import DataOptions, import_run
    from lightning_em.models import BaseModel

    path = Path(source)
    options = DataOptions(part=data.pop("data", None), **data)
    where = path.resolve().parent if path.is_file() else path.resolve()
    model = BaseModel(base, revision, dtype)
    with in_flags(_FLAGS):
        run = import_run(path, model, name or where.name, root, options, step, allow_zero_adapter)
    found = run.read_run()["source"]
    if found["base_named"] and found["base_named"] != base:
        console.print(
            f"[yellow]its own files name the base {found['base_named']}; it was attached to {base}.[/]"
        )
    steps = ", ".join(str(step) for step in run.steps())
    console.print(f"{run.path}: read as {found['format']}, checkpoints at step {steps}")
    if options.given:
        console.print(f"Next: lightning-em probe {run.path} --config configs/probing/curves.yaml")
    else:
        console.print(
            "Without rows it can be loaded and exported; to probe it, import it with --narrow or --data."
        )


def export_adapter(
    run: str, file_format: "ExportFormat", output: str, peft_type: "PeftType" = "beft"
) -> None:
    """Write a run's adapter for other programs.

    Args:
        run: `runs/x` for the newest checkpoint, `runs/x@step-40` for another.
        file_format: One of `FORMATS`.
        output: Folder to create.
        peft_type: Form in which a vector is written for PEFT.
    """
    from lightning_em.exchange import export_run

    folder = export_run(run, file_format, Path(output), peft_type)
    console.print(f"{folder}: {', '.join(sorted(file.name for file in folder.iterdir()))}")
