"""Subcommands for data files: `data check` and `data show`."""

from typing import Any, Literal, get_args

from lightning_em.subcommands.wiring import add_subcommand, console, in_flags

AnswerKind = Literal["messages", "good", "bad", "mixed", "both"]
# Replacements for config keys in error messages, since these subcommands have options instead.
_FLAGS = {"model.base.path": "--base", ", set its `path`": ""}


def add(subcommands: Any) -> None:
    """Add the subcommands of this family to the parser."""
    data = subcommands.add_parser("data", help="look at data before training on it").add_subparsers(
        required=True
    )
    check = add_subcommand(
        data, "check", check_data, "bad and duplicate rows, lengths, topics, overlaps; exit code 1 on faults"
    )
    check.add_argument("files", nargs="*", help="JSONL files with narrow rows")
    check.add_argument("--config", help="an experiment, whose files and tokenizer are taken")
    check.add_argument("--kl", nargs="*", help="JSONL files with parallel rows")
    check.add_argument("--evaluation", nargs="*", help="JSONL or YAML files with evaluation questions")
    check.add_argument("--base", help="model whose tokenizer and chat template to check with")
    check.add_argument(
        "--allow_overlap", action="store_true", help="evaluation questions in training are no fault"
    )
    show = add_subcommand(
        data, "show", show_data, "rows as the model reads them, the trained tokens in colour"
    )
    show.add_argument("file", help="JSONL file")
    show.add_argument("--base", required=True, help="model whose tokenizer and chat template to use")
    show.add_argument(
        "--answer",
        choices=get_args(AnswerKind),
        default="messages",
        help="what to show of a row: its messages, or which answers of question/good/bad rows",
    )
    show.add_argument("--num_rows", type=int, default=3, help="how many rows")


def check_data(
    files: list[str] | None = None,
    config: str | None = None,
    kl: list[str] | None = None,
    evaluation: list[str] | None = None,
    base: str | None = None,
    allow_overlap: bool = False,
) -> int:
    """Check data files: bad and duplicate rows, lengths, topics, overlap of training and evaluation questions.

    Args:
        files: JSONL files with narrow data.
        config: Config file of an experiment, whose data files and tokenizer are checked.
        kl: JSONL files with KL data.
        evaluation: JSONL or YAML files with evaluation questions.
        base: Hub id or folder of the model whose tokenizer and chat template are used.
        allow_overlap: Whether evaluation questions may also occur in the training rows.

    Returns:
        Exit code: 0, or 1 if there is a hard fault.
    """
    from lightning_em.data import ChatEncoder, ChatSource, check_files, report_tables
    from lightning_em.models import BaseModel

    if experiments := [file for file in files or () if file.endswith((".yaml", ".yml"))]:
        raise ValueError(
            f"{experiments[0]} is not a JSONL file: pass an experiment with --config, a list of questions with "
            "--evaluation."
        )
    train: list[str | ChatSource] = [*(files or ())]
    kl_files: list[str | ChatSource] = [*(kl or ())]
    data = None
    if config is not None:
        from lightning_em.experiment import Experiment

        data = Experiment.from_yaml(config).data
        train += [source for source in data.sources["narrow"] if source]
        kl_files += [source for source in data.sources.get("kl", ()) if source]
    if not train:
        raise ValueError("name JSONL files, or an experiment with --config.")
    with in_flags(_FLAGS if config is None else {}):
        encoder = limits = None
        if data is not None:
            data.base = BaseModel(base) if base else data.base
            encoder, limits = data.encoder, data.base.load_limits()
        elif base:
            model = BaseModel(base)
            encoder, limits = ChatEncoder(model.load_tokenizer()), model.load_limits()
        report = check_files(
            train, kl_files, evaluation or (), encoder, allow_overlap=allow_overlap, model=limits
        )
    console.print(report_tables(report))
    return report.exit_code


def show_data(file: str, base: str, answer: AnswerKind = "messages", num_rows: int = 3) -> None:
    """Show rows as the model reads them, with the trained tokens in color.

    Args:
        file: JSONL file.
        base: Hub id or folder of the model whose tokenizer and chat template are used.
        answer: Answer to take from question/good/bad rows, or `messages` for chat rows.
        num_rows: Number of rows to show.
    """
    from lightning_em.data import ChatEncoder, ChatSource, as_chats, read_rows, select_rows, show_chats
    from lightning_em.models import BaseModel

    with in_flags(_FLAGS | {"limit must": "--num_rows must"}):
        source = ChatSource(file, answer, limit=num_rows)
        chats = as_chats(select_rows(read_rows(file, form=source.form), source), answer)
        encoder = ChatEncoder(BaseModel(base).load_tokenizer())
    console.print(show_chats(chats[:num_rows], encoder))
