"""The user's files are read whole or refused in one line that names the file."""

import json
import sys
from dataclasses import replace

import pytest

from dsv3_jax.config import DataConfig
from dsv3_jax.data import files
from dsv3_jax.data.documents import Document


def read(pattern, **settings) -> list[Document]:
    return list(files.documents(replace(DataConfig(corpus=str(pattern)), **settings)))


def refused(pattern, **settings) -> str:
    """The one line of the error."""
    with pytest.raises(ValueError) as caught:
        read(pattern, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "poems"
    path.mkdir()
    return path


def test_text_files_are_documents_of_their_folder_with_their_bytes_unchanged(folder):
    (folder / "b.txt").write_bytes("zwei\r\nZeilen ✓".encode())
    (folder / "a.md").write_text("# one\n")
    (folder.parent / "prose").mkdir()
    (folder.parent / "prose" / "c.txt").write_text("three")
    assert read(f"{folder}/*.txt, {folder}/*.md,{folder.parent}/prose/*") == [
        ("poems", "# one\n"), ("poems", "zwei\r\nZeilen ✓"), ("prose", "three"),
    ]  # fmt: skip


def test_a_file_that_two_globs_match_is_read_once(folder):
    (folder / "a.txt").write_text("one")
    assert len(read(f"{folder}/*.txt,{folder}/a.*,{folder.parent}/**/*")) == 1


def test_a_glob_within_the_folder_still_knows_the_folders_name(folder, monkeypatch):
    (folder / "a.txt").write_text("one")
    monkeypatch.chdir(folder)
    assert read(f"*.txt,{folder}/*") == [("poems", "one")]


def test_a_long_text_becomes_several_documents_that_join_to_it(folder):
    text = "".join(f"line {i}\n" for i in range(40_000))
    (folder / "a.txt").write_text(text)
    found = read(f"{folder}/a.txt")
    assert len(found) > 3 and "".join(d.text for d in found) == text
    assert all(len(d.text) <= files.PIECE and d.text.endswith("\n") for d in found)


def test_json_lines_take_the_domain_from_the_path_or_a_field(folder):
    rows = [{"text": "first\u2028line", "kind": "x"}, {"text": "second", "kind": "y", "more": 1}]
    (folder / "a.jsonl").write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    assert read(f"{folder}/a.jsonl") == [("poems", "first\u2028line"), ("poems", "second")]
    assert read(f"{folder}/a.jsonl", domain_from="kind") == [("x", "first\u2028line"), ("y", "second")]
    assert read(f"{folder}/a.jsonl", text_field="kind")[0].text == "x"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt: the file is empty"),
        ("a.jsonl", b"", "a.jsonl: the file is empty"),
        ("a.jsonl", b"\n\n", "a.jsonl: no record"),
        ("a.txt", b" \n", "a.txt: there is nothing but white space"),
        ("a.txt", b"good\nbad \xff\n", "a.txt, line 2: expected UTF-8, got byte 0xff"),
        ("a.jsonl", b'{"text": "ok"}\n{"text": "\xe9"}', "a.jsonl, line 2: expected UTF-8, got byte 0xe9"),
        ("a.jsonl", b'{"text": "ok"}\n\n{"text": }\n', "a.jsonl, line 3: not JSON: Expecting value at column 10"),
        ("a.jsonl", b'{"text": "ok"}\n' + b"[" * 100_000, "a.jsonl, line 2: brackets within brackets, too deep"),
        ("a.jsonl", b'{"text": "ok", "n": ' + b"1" * 5_000 + b"}", "a.jsonl, line 1: expected numbers of at most 4,300 digits"),
        ("a.jsonl", b'{"text": "ok"}\n["text"]\n', "a.jsonl, line 2: expected an object, got list"),
        ("a.jsonl", b'{"body": "x", "id": 1}\n', "a.jsonl, line 1: no field 'text', only body, id"),
        ("a.jsonl", b'{"text": 7}\n', "a.jsonl, line 1: expected text in field 'text', got int"),
        ("a.jsonl", b'{"text": ""}\n', "a.jsonl, line 1: expected text in field 'text', got empty text"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "a.jsonl, line 1: field 'text' holds half of a surrogate pair"),
    ],
)
def test_bad_files_are_refused_with_file_and_line(folder, name, content, message):
    (folder / name).write_bytes(content)
    assert message in refused(f"{folder}/*")


def test_globs_that_match_nothing_are_refused(folder):
    (folder / "a.txt").write_text("one")
    assert refused(f"{folder}/*.md") == f"corpus: no file matches '{folder}/*.md'"
    assert "no file matches" in refused(f"{folder}/a.txt,{folder}/b.txt")
    assert refused(" , ") == "corpus: expected `embedded` or a glob of files, got nothing"


def test_a_text_file_has_no_field_for_the_domain(folder):
    (folder / "a.txt").write_text("one")
    assert "a text file has no field 'kind'" in refused(f"{folder}/a.txt", domain_from="kind")


def test_a_missing_domain_field_is_refused(folder):
    (folder / "a.jsonl").write_text('{"text": "one"}\n')
    assert "line 1: no field 'kind', only text" in refused(f"{folder}/a.jsonl", domain_from="kind")


def test_parquet_rows_are_documents(folder):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"body": ["one", "two"], "kind": ["x", "y"], "unused": [1, 2]})
    parquet.write_table(table, folder / "a.parquet")
    assert read(f"{folder}/*.parquet", text_field="body") == [("poems", "one"), ("poems", "two")]
    assert read(f"{folder}/*.parquet", text_field="body", domain_from="kind") == [("x", "one"), ("y", "two")]
    assert "a.parquet: no column 'text', only body, kind, unused" in refused(f"{folder}/*.parquet")
    assert "a.parquet, row 1: expected text in field 'unused', got int" in refused(f"{folder}/*.parquet", text_field="unused")
    parquet.write_table(pyarrow.table({"text": ["one", None]}), folder / "a.parquet")
    assert "a.parquet, row 2: expected text in field 'text', got NoneType" in refused(f"{folder}/*.parquet")
    (folder / "a.parquet").write_bytes(b"PAR1 but no more")
    assert "a.parquet: not a readable Parquet file" in refused(f"{folder}/*.parquet")


def test_parquet_without_pyarrow_names_the_extra(folder, monkeypatch):
    (folder / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install 'dsv3_jax[parquet]'" in refused(f"{folder}/*.parquet")


def test_the_fingerprint_changes_with_contents_names_and_fields(folder):
    (folder / "a.txt").write_text("one")
    config = DataConfig(corpus=f"{folder}/*")
    before = files.fingerprint(config)
    assert files.fingerprint(config) == before
    assert files.fingerprint(replace(config, text_field="body")) != before
    (folder / "a.txt").write_text("two")
    changed = files.fingerprint(config)
    assert changed != before
    (folder / "a.txt").rename(folder / "b.txt")
    assert files.fingerprint(config) not in (before, changed)
