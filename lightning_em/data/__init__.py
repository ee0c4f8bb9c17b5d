"""Chat data: read rows, mask responses, and order the rows for training."""

from lightning_em.data.chat import ChatEncoder, EncodedChat, encode_chat
from lightning_em.data.datamodule import EMDataModule, TokenizerSource
from lightning_em.data.doctor import DataReport, check_files
from lightning_em.data.encoding import EncodedRows, LengthLimit, encode_chats, encode_prompts
from lightning_em.data.limits import ModelLimits
from lightning_em.data.loaders import BatchLoader
from lightning_em.data.position import Position, Regearing, forget_finished_epoch
from lightning_em.data.rows import FileScan, Row, RowError, RowErrors, read_rows, scan_rows
from lightning_em.data.sampler import MicroBatchIndices, RowCounts, StepSampler
from lightning_em.data.show import report_tables, show_chats
from lightning_em.data.sources import Chat, ChatSource, as_chats, select_rows
from lightning_em.data.steps import BatchGeometry
from lightning_em.data.template import DEFAULT_TEMPLATE_DATE, Message

__all__ = [
    "DEFAULT_TEMPLATE_DATE",
    "BatchGeometry",
    "BatchLoader",
    "Chat",
    "ChatEncoder",
    "ChatSource",
    "DataReport",
    "EMDataModule",
    "EncodedChat",
    "EncodedRows",
    "FileScan",
    "LengthLimit",
    "Message",
    "MicroBatchIndices",
    "ModelLimits",
    "Position",
    "Regearing",
    "Row",
    "RowCounts",
    "RowError",
    "RowErrors",
    "StepSampler",
    "TokenizerSource",
    "as_chats",
    "check_files",
    "encode_chat",
    "encode_chats",
    "encode_prompts",
    "forget_finished_epoch",
    "read_rows",
    "report_tables",
    "scan_rows",
    "select_rows",
    "show_chats",
]
