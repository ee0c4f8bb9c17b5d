"""Terminal output of the `data` subcommands: the check report, and rows with trained tokens in color."""

from collections.abc import Iterable, Sequence
from itertools import groupby

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lightning_em.data.chat import ChatEncoder
from lightning_em.data.doctor import DataReport, FileReport, Overlap
from lightning_em.data.overlap import count_by_likeness
from lightning_em.data.sources import Chat

_SHOWN = 10
_BAR = 30


def report_tables(report: DataReport) -> RenderableType:
    """Format the report of `check_files` for a terminal; texts from files are never interpreted as markup."""
    parts: list[RenderableType] = []
    for file in report.files:
        parts += _file_parts(file)
    parts += [_overlap_line(overlap) for overlap in report.overlaps]
    if report.held_out_topics or report.shared_topics:
        parts.append(
            Text(f"evaluation topics not in training: {', '.join(report.held_out_topics) or 'none'}")
        )
        parts.append(Text(f"evaluation topics also in training: {', '.join(report.shared_topics) or 'none'}"))
    if report.faults:
        parts += [Text(f"FAULT {fault}", style="bold red") for fault in report.faults]
    else:
        parts.append(Text("no faults", style="green"))
    return Group(*parts)


def show_chats(chats: Sequence[Chat], encoder: ChatEncoder) -> RenderableType:
    """Format conversations as the model reads them: trained text in bold green, the rest dim.

    Line breaks are printed both as escapes and as line breaks, so that one can see which of them are trained.
    """
    parts: list[RenderableType] = []
    for chat in chats:
        encoded = encoder.encode(chat.messages)
        trained = sum(encoded.response_mask)
        head = f"{chat.row.path}:{chat.row.line}  {len(encoded.input_ids)} tokens, {trained} trained"
        body = Text()
        pairs = zip(encoded.input_ids, encoded.response_mask, strict=True)
        for is_trained, run in groupby(pairs, key=lambda pair: pair[1]):
            text = str(encoder.tokenizer.decode([token for token, _ in run]))
            body.append(_visible(text), style="bold green" if is_trained else "dim")
        parts += [Text(head, style="bold"), body, Text()]
    return Group(*parts)


def _file_parts(file: FileReport) -> Iterable[RenderableType]:
    table = Table("what", "value", title=Text(f"{file.scan.path} ({file.purpose})"), show_header=False)
    table.add_row("sha256", file.scan.sha256)
    if file.scan.revision:
        table.add_row("revision", file.scan.revision)
    table.add_row(
        "rows", f"{len(file.scan.rows)}, {file.scan.num_blank} blank lines, {len(file.scan.errors)} bad"
    )
    if file.questions and not file.scan.rows:
        table.add_row("questions", str(len(file.questions)))
    if set(file.topics) - {None}:
        counts = sorted(file.topics.items(), key=lambda item: (-item[1], str(item[0])))
        table.add_row("topics", Text(", ".join(f"{topic or 'no topic'} {count}" for topic, count in counts)))
    for kind, lengths in file.lengths.items():
        table.add_row(
            f"{kind} characters",
            f"{lengths.count} texts, {lengths.shortest} to {lengths.longest}, mean {lengths.mean:.0f}",
        )
    likeness = count_by_likeness(file.repeated)
    table.add_row("repeated questions", ", ".join(f"{count} {kind}" for kind, count in likeness.items()))
    table.add_row("answers without final punctuation", str(file.num_unfinished))
    if file.num_truncated is not None:
        table.add_row("longer than allowed", f"{file.num_truncated}, {file.num_lost} lose the whole response")
    table.add_row("longer than the model was made for", str(len(file.beyond)))
    for kind, number in file.thoughts.items():
        table.add_row(f"{kind} of the chat template", str(number))
    yield table
    yield from _histograms(file)
    yield from (Text(f"  {row}", style="yellow") for row in file.beyond[:_SHOWN])
    errors = [*file.scan.errors, *file.unusable, *file.unreadable]
    for error in errors[:_SHOWN]:
        yield Text(f"  {error}", style="red")
    if len(errors) > _SHOWN:
        yield Text(f"  ... and {len(errors) - _SHOWN} more", style="red")


def _histograms(file: FileReport) -> Iterable[RenderableType]:
    for kind, lengths in file.lengths.items():
        most = max((count for _, count in lengths.histogram), default=1)
        for bound, count in lengths.histogram:
            bar = "#" * max(1, round(_BAR * count / most))
            yield Text(f"  {kind:>9} <= {bound:>6} characters {count:>6} {bar}")


def _overlap_line(overlap: Overlap) -> Text:
    counts = ", ".join(f"{count} {kind}" for kind, count in count_by_likeness(overlap.matches).items())
    text = Text(f"questions of {overlap.second} also in {overlap.first}: {counts}")
    for match in overlap.matches[:_SHOWN]:
        text.append(f"\n  {match.second} is {match.likeness} ({match.similarity:.2f}) {match.first}: ")
        text.append(_visible(match.second.text[:80]))
    return text


def _visible(text: str) -> str:
    """Show line breaks and control characters as escapes."""
    shown = text.replace("\n", "\\n\n")
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in shown)
