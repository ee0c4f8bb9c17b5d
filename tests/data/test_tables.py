import gzip
import hashlib
import json
import time

import pytest
from datasets import Dataset, DatasetDict, disable_progress_bars, enable_progress_bars

from lightning_em.data import ChatSource, EMDataModule, RowErrors, check_files, read_rows, scan_rows
from lightning_em.data.tables import is_table
from lightning_em.models import BaseModel
from tests.tiny import answer_rows, chat_rows, write_rows

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ANSWERS, CHATS = answer_rows(12), chat_rows(12)


@pytest.fixture(autouse=True)
def no_progress_bars():
    disable_progress_bars()
    yield
    enable_progress_bars()


def write_table(folder, rows, suffix: str) -> str:
    file = folder / f"rows{suffix}"
    if suffix == ".jsonl":
        write_rows(file, rows)
    elif suffix == ".json":
        file.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(file)
    elif suffix == ".csv":
        Dataset.from_list(rows).to_csv(file)
    else:
        Dataset.from_list(rows).save_to_disk(file, num_shards=2)
    return str(file)


def contents(path: str) -> list[tuple]:
    return [(row.id, row.line, row.messages, row.question, row.good, row.bad) for row in read_rows(path)]


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """Build a hub cache with org/answers at one commit, in the layout of `hf download`."""
    repository = tmp_path / "hub" / "datasets--org--answers"
    snapshot = repository / "snapshots" / COMMIT
    (snapshot / "data").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    Dataset.from_list(ANSWERS[:8]).to_parquet(snapshot / "data" / "train-00000-of-00001.parquet")
    Dataset.from_list(ANSWERS[8:]).to_parquet(snapshot / "data" / "test-00000-of-00001.parquet")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return snapshot


@pytest.mark.parametrize("suffix", [".json", ".parquet", ".csv", ""])
def test_every_format_gives_the_rows_of_the_same_jsonl(tmp_path, suffix):
    expected = contents(write_table(tmp_path, ANSWERS, ".jsonl"))
    assert contents(write_table(tmp_path, ANSWERS, suffix)) == expected


@pytest.mark.parametrize("suffix", [".json", ".parquet", ""])
def test_every_format_but_csv_gives_conversations(tmp_path, suffix):
    expected = contents(write_table(tmp_path, CHATS, ".jsonl"))
    assert contents(write_table(tmp_path, CHATS, suffix)) == expected


@pytest.mark.parametrize("suffix", [".json", ".parquet", ".csv", ""])
def test_bad_rows_are_named_by_their_number(tmp_path, suffix):
    rows = [*ANSWERS[:2], ANSWERS[2] | {"good": "  "}, ANSWERS[3]]
    path = write_table(tmp_path, rows, suffix)
    with pytest.raises(RowErrors, match=rf"rows{suffix}:3: `good` of the row is empty"):
        read_rows(path)


def test_rows_of_two_forms_in_one_table_are_told_apart_by_their_empty_cells(tmp_path):
    path = write_table(tmp_path, [ANSWERS[0] | {"messages": None}, CHATS[1]], ".parquet")
    first, second = read_rows(path)
    assert first.question == ANSWERS[0]["question"]
    assert list(second.messages) == CHATS[1]["messages"]


def test_empty_cells_of_a_message_are_absent_and_filled_ones_refused(tmp_path):
    turns = [
        {"role": "user", "content": "Q", "name": None},
        {"role": "assistant", "content": "A", "name": None},
    ]
    named = [turns[0] | {"name": "Ada"}, turns[1]]
    path = write_table(tmp_path, [{"messages": turns}, {"messages": named}], ".parquet")
    with pytest.raises(
        RowErrors, match=r"^1 bad row:\n.*:2: messages\[0\] has \['name'\], which would be ignored"
    ):
        read_rows(path)


def test_cells_of_csv_are_text_or_absent(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text('\ufeffid,question,good,bad,topic\n1,"2 + 2?",4,NA,\n02,"line\nbreak",None,null,tea\n')
    first, second = read_rows(str(file))
    assert (first.id, first.good, first.bad, first.topic) == ("1", "4", "NA", None)
    assert (second.id, second.question, second.good, second.bad) == ("02", "line\nbreak", "None", "null")


def test_empty_cell_of_csv_is_a_missing_answer(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("question,good,bad\nQ,G,\n")
    with pytest.raises(RowErrors, match=r"rows\.csv:1: the row has no `bad`; it has \['good', 'question'\]"):
        read_rows(str(file))
    assert scan_rows(str(file), questions_only=True).rows[0].bad is None


@pytest.mark.parametrize(
    "header", ["question, good ,bad", " question,good,\tbad", "\ufeffquestion ,good, bad,id "]
)
def test_spaces_around_names_of_columns_are_ignored(tmp_path, header):
    file = tmp_path / "rows.csv"
    file.write_text(f"{header}\n Q ?, G,B {',7' if 'id' in header else ''}\n", encoding="utf-8")
    [row] = read_rows(str(file))
    assert (row.question, row.good, row.bad) == (" Q ?", " G", "B ")
    assert row.id == "7" or "id" not in header
    Dataset.from_list([{f" {key} ": value for key, value in ANSWERS[0].items()}]).to_parquet(
        tmp_path / "rows.parquet"
    )
    assert read_rows(str(tmp_path / "rows.parquet"))[0].question == ANSWERS[0]["question"]


@pytest.mark.parametrize("header", ["question,good,bad,good", "question,good,bad,good ", "id,id,id"])
def test_column_that_stands_twice_is_refused(tmp_path, header):
    file = tmp_path / "rows.csv"
    file.write_text(f"{header}\nQ,G,B,H\n")
    with pytest.raises(ValueError, match=r"rows\.csv:1: the columns \['(good|id)'\] occur twice"):
        read_rows(str(file))


def test_compressed_parts_of_a_hub_set_are_read(hub_cache):
    (hub_cache / "data" / "train-00000-of-00001.parquet").unlink()
    (hub_cache / "data" / "test-00000-of-00001.parquet").unlink()
    for part in range(2):
        lines = "".join(json.dumps(row | {"note": None}) + "\n" for row in ANSWERS[part::2])
        (hub_cache / "data" / f"train-0000{part}-of-00002.jsonl.gz").write_bytes(
            gzip.compress(lines.encode())
        )
    rows = read_rows(f"hf://org/answers@{COMMIT}")
    assert [row.question for row in rows] == [row["question"] for row in (*ANSWERS[::2], *ANSWERS[1::2])]


def test_json_array_keeps_what_a_table_would_lose(tmp_path):
    file = tmp_path / "rows.json"
    turns = '{"role": "user", "content": "2020-01-01"}, {"role": "assistant", "content": "2020-01-02"}'
    file.write_text(f'[{{"messages": [{turns}]}}]')
    (row,) = read_rows(str(file))
    assert row.messages[0]["content"] == "2020-01-01"
    file.write_text('[{"question": "Q", "question": "R", "good": "G", "bad": "B"}]')
    with pytest.raises(RowErrors, match=r"rows\.json:1: the key 'question' occurs twice"):
        read_rows(str(file))


def test_broken_json_array_is_named_by_its_line(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(ANSWERS, indent=1)[:-20])
    number = file.read_text().count("\n") + 1
    with pytest.raises(RowErrors, match=rf"rows\.json:{number}: not JSON at column"):
        read_rows(str(file))


def test_json_lines_may_be_called_json(tmp_path):
    file = write_rows(tmp_path / "rows.json", ANSWERS)
    assert len(read_rows(str(file))) == len(ANSWERS)


def test_same_id_twice_is_refused_in_a_table(tmp_path):
    path = write_table(tmp_path, [row | {"id": 7} for row in ANSWERS[:2]], ".parquet")
    with pytest.raises(RowErrors, match=r":2: id '7' is also on line 1"):
        read_rows(path)


def test_columns_that_are_not_ours_are_named(tmp_path):
    path = write_table(tmp_path, [{"instruction": "Q", "output": "A"}], ".parquet")
    with pytest.raises(RowErrors, match=r"expected a column `messages`.*got \['instruction', 'output'\]"):
        read_rows(path)


def test_table_without_rows_is_an_error(tmp_path):
    empty = Dataset.from_dict({"question": [], "good": [], "bad": []})
    empty.save_to_disk(tmp_path / "rows")
    with pytest.raises(ValueError, match=r"rows has no rows"):
        read_rows(str(tmp_path / "rows"))
    empty.to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=r"rows\.parquet cannot be read: .*no data"):
        read_rows(str(tmp_path / "rows.parquet"))


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_broken_file_is_named(tmp_path, suffix):
    file = tmp_path / f"rows{suffix}"
    file.write_bytes(b"PAR1 is how it begins\nbut,it,\nis,no,table,at,all\n")
    with pytest.raises(ValueError, match=rf"rows{suffix} cannot be read: "):
        read_rows(str(file))


def test_missing_table_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.parquet: no such file"):
        read_rows(str(tmp_path / "none.parquet"))


def test_folder_of_splits_asks_for_one(tmp_path):
    DatasetDict(train=Dataset.from_list(ANSWERS), test=Dataset.from_list(ANSWERS[:3])).save_to_disk(
        tmp_path / "set"
    )
    with pytest.raises(
        ValueError, match=r"set holds the splits \['test', 'train'\]; name one of them: .*set/train"
    ):
        read_rows(str(tmp_path / "set"))
    assert len(read_rows(str(tmp_path / "set" / "test"))) == 3


def test_other_folder_is_no_data_set(tmp_path):
    assert not is_table(tmp_path)
    with pytest.raises(ValueError, match="a folder"):
        read_rows(str(tmp_path))


def test_sha256_is_of_the_bytes(tmp_path):
    file = tmp_path / "rows.parquet"
    path = write_table(tmp_path, ANSWERS, ".parquet")
    assert scan_rows(path).sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    folder = write_table(tmp_path, ANSWERS, "")
    shards = b"".join(shard.read_bytes() for shard in sorted((tmp_path / "rows").glob("*.arrow")))
    assert scan_rows(folder).sha256 == hashlib.sha256(shards).hexdigest()


def test_nothing_is_left_in_the_cache_of_datasets(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    path = write_table(tmp_path, ANSWERS, ".parquet")
    before = contents(path)
    write_table(tmp_path, ANSWERS[::-1], ".parquet")
    assert [row[2:] for row in contents(path)] == [row[2:] for row in before[::-1]]
    assert not (tmp_path / "cache").exists()


def test_hub_set_is_read_from_the_cache_at_its_commit(hub_cache, caplog):
    scan = scan_rows(f"hf://org/answers@{COMMIT}")
    assert [row.question for row in scan.rows] == [row["question"] for row in ANSWERS[:8]]
    data = hub_cache / "data" / "train-00000-of-00001.parquet"
    assert (scan.revision, scan.sha256) == (COMMIT, hashlib.sha256(data.read_bytes()).hexdigest())
    assert "names no revision" not in caplog.text


def test_hub_set_without_revision_is_the_newest_and_says_how_to_pin_it(hub_cache, caplog):
    scan = scan_rows("hf://org/answers:test")
    assert [row.question for row in scan.rows] == [row["question"] for row in ANSWERS[8:]]
    assert scan.rows[1].line == 2
    assert f"hf://org/answers@{COMMIT}" in caplog.text


def test_unknown_split_is_named(hub_cache):
    with pytest.raises(ValueError, match=r"no split 'dev'; expected one of \['test', 'train'\]"):
        read_rows("hf://org/answers:dev")


@pytest.mark.parametrize("path", ["hf://org/other", f"hf://org/answers@{COMMIT[::-1]}:train"])
def test_hub_set_that_cannot_be_had_offline_is_an_error_within_seconds(hub_cache, path):
    started = time.monotonic()
    with pytest.raises(
        ValueError, match=r"not in the cache and could not be downloaded.*hf download --repo-type"
    ):
        read_rows(path)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    "path", ["hf://answers", "hf://datasets/org/answers", "hf://org/answers@", "hf://org/a:b:c"]
)
def test_other_hub_addresses_are_refused(path):
    with pytest.raises(ValueError, match=r"expected hf://org/name"):
        read_rows(path)


def test_run_records_file_and_commit(hub_cache, tmp_path, tiny_model_folder):
    path = write_table(tmp_path, CHATS, ".parquet")
    base = BaseModel(str(tiny_model_folder()))
    kl = ChatSource(f"hf://org/answers@{COMMIT}", answer="mixed")
    data = EMDataModule(base, ChatSource(path), kl)
    data.setup("fit")
    found = data.fingerprint()
    assert found["narrow.file"] == scan_rows(path).sha256
    assert found["kl.revision"] == COMMIT
    assert "narrow.revision" not in found


def test_doctor_reads_tables(hub_cache, tmp_path):
    path = write_table(tmp_path, ANSWERS[6:], ".parquet")
    report = check_files([path], evaluation=["hf://org/answers:train"])
    exact = [match.second for match in report.overlaps[0].matches if match.likeness == "exact"]
    assert list(map(str, exact)) == ["hf://org/answers:train:7", "hf://org/answers:train:8"]
