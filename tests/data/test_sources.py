"""Documents come out whole, in order, and every unreadable input is one clear error."""

import dataclasses
import hashlib
import importlib
import json
import sys

import pyarrow
import pytest
from pyarrow import parquet

from nemotron_jax.data.sources import EXCLUDED_FOLDERS, collect, manifest_of


def test_the_standard_library_is_read_in_order_without_its_tests():
    collection = collect("python_stdlib")
    names = [record.name for record in collection.files]
    assert names == [record.name for record in collect("python_stdlib").files]
    assert {"os.py", "json/decoder.py", "typing.py"} <= set(names)
    assert not any(EXCLUDED_FOLDERS.intersection(name.split("/")[:-1]) for name in names)
    assert sum(record.bytes for record in collection.files) > 4_000_000
    decoder = next(d for d in collection.documents if d.name == "json/decoder.py")
    with open(importlib.import_module("json.decoder").__file__, encoding="utf-8", newline="") as f:
        assert decoder.text == f.read()


def test_a_folder_gives_its_text_files_sorted_without_hidden_and_blank_ones(tmp_path):
    for name, text in {
        "b.md": "b\r\nx",
        "a/z.txt": "z",
        "a/c.py": "c",
        "e.txt": " \n",
        "x.bin": "no",
        ".git/h.txt": "hidden",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    (tmp_path / "r.jsonl").write_text(
        json.dumps({"text": "one\u2028two", "other": 1}) + "\n\n" + '{"text": "three\u2028"}\n'
    )
    collection = collect(f"hf:{tmp_path}")
    assert [(d.name, d.text) for d in collection.documents] == [
        ("a/c.py", "c"),
        ("a/z.txt", "z"),
        ("b.md", "b\r\nx"),
        ("r.jsonl:1", "one\u2028two"),
        ("r.jsonl:3", "three\u2028"),
    ]
    assert [r.name for r in collection.files] == ["a/c.py", "a/z.txt", "b.md", "e.txt", "r.jsonl"]
    assert collection.files[0].sha256 == hashlib.sha256(b"c").hexdigest()
    single = collect(f"hf:{tmp_path / 'b.md'}")
    assert [d.name for d in single.documents] == ["b.md"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.jsonl", b'{"text": "fine"}\n{"text": "cut\n', ["row 2", "not JSON"]),
        (
            "x.jsonl",
            b'{"text": "fine"}\n{"body": "no text"}\n',
            ["row 2", "no field 'text'", "'body'"],
        ),
        ("x.jsonl", b'{"text": 5}\n', ["row 1", "int"]),
        ("x.jsonl", b'["a list"]\n', ["row 1", "list"]),
        ("x.jsonl", b'{"text": "\\ud83d"}\n', ["row 1", "surrogate"]),
        ("x.jsonl", b'{"text": "\xff"}\n', ["x.jsonl", "UTF-8"]),
        ("x.txt", b"fine until \xe9t\xe9", ["x.txt", "not UTF-8 at byte 11"]),
        ("x.txt", b"  \n", ["holds no text"]),
        ("x.csv", b"text\nno", [".csv", ".jsonl"]),
    ],
)
def test_an_unreadable_file_is_an_error_naming_the_place(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as error:
        collect(f"hf:{tmp_path / name}")
    assert all(word in str(error.value) for word in [str(tmp_path), *words]), error.value


def test_missing_empty_and_unknown_sources_are_errors(tmp_path):
    with pytest.raises(ValueError, match="no file or folder"):
        collect(f"hf:{tmp_path / 'absent'}")
    with pytest.raises(ValueError, match="holds no text: read 0 files"):
        collect(f"hf:{tmp_path}")
    with pytest.raises(ValueError, match="'wikipedia' is unknown.*hf:PATH"):
        collect("wikipedia")


def test_parquet_without_pyarrow_names_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="x.parquet needs pyarrow; install it"):
        collect(f"hf:{tmp_path}")


def test_parquet_rows_are_documents(tmp_path):
    table = pyarrow.table({"text": ["one", "zwei", "三"], "id": [1, 2, 3]})
    parquet.write_table(table, tmp_path / "x.parquet")
    documents = collect(f"hf:{tmp_path}").documents
    assert [(d.name, d.text) for d in documents] == [
        ("x.parquet:1", "one"),
        ("x.parquet:2", "zwei"),
        ("x.parquet:3", "三"),
    ]
    parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="x.parquet.*none named 'text'"):
        collect(f"hf:{tmp_path}")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(ValueError, match="x.parquet cannot be read as parquet"):
        collect(f"hf:{tmp_path}")
    parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="row 2 has NoneType"):
        collect(f"hf:{tmp_path}")


def test_the_fingerprint_sees_one_byte_and_not_the_place(tmp_path):
    def manifest(folder, text="same text", name="x.txt", fraction=0.1):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).write_text(text)
        return manifest_of([collect(f"hf:{tmp_path / folder}")], fraction)

    first = manifest("a")
    assert manifest("elsewhere").fingerprint() == first.fingerprint()
    assert first.differences(manifest("a")) == []
    others = {
        "x.txt has other contents": manifest("b", text="same texT"),
        "x.txt is gone": manifest("c", name="y.txt"),
        "y.txt is new": manifest("a", name="y.txt"),
        "held_out_fraction": manifest("d", fraction=0.2),
    }
    for line, other in others.items():
        assert other.fingerprint() != first.fingerprint()
        assert any(line in difference for difference in first.differences(other))
    assert type(first).from_json(json.loads(json.dumps(first.to_json()))) == first
    assert dataclasses.replace(first, sources=("moved",)).fingerprint() == first.fingerprint()


def test_endings_of_any_case_are_read_and_other_files_are_named(tmp_path):
    (tmp_path / "A.JSONL").write_text('{"text": "upper case"}\n')
    (tmp_path / "b.Txt").write_text("mixed case")
    (tmp_path / "c.json").write_text("{}")
    (tmp_path / "d.jsonl.gz").write_bytes(b"\x1f\x8b")
    (tmp_path / ".hidden.csv").write_text("a")
    found = collect(f"hf:{tmp_path}")
    assert [document.text for document in found.documents] == ["upper case", "mixed case"]
    assert found.left_out == ("c.json", "d.jsonl.gz")


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfwords")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "row"}\n')
    found = collect(f"hf:{tmp_path}")
    assert [document.text for document in found.documents] == ["words", "row"]
