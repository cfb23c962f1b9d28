"""Files of every ending and data sets with configurations are read. Run: pytest tests/data/test_tables.py"""

import bz2
import gzip
import json
import lzma
import zipfile

import pyarrow
import pytest
from datasets import Dataset

from peft_blueprint.data import read_examples, read_table
from peft_blueprint.errors import BlueprintError


ROWS = [{"prompt": f"what is {i}", "completion": f"number {i}"} for i in range(4)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
COMMAS = b"prompt,completion\n" + b"".join(f"{r['prompt']},{r['completion']}\n".encode() for r in ROWS)
COMPRESSED = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


def write(path):
    """Write the rows in the form that the file's ending tells."""
    kind = path.suffixes[0].lower()
    if kind == ".parquet":
        Dataset.from_list(ROWS).to_parquet(path)
    elif kind == ".arrow":
        table = pyarrow.Table.from_pylist(ROWS)
        with pyarrow.ipc.new_stream(str(path), table.schema) as file:
            file.write_table(table)
    else:
        content = {".json": json.dumps(ROWS).encode(), ".csv": COMMAS, ".tsv": COMMAS.replace(b",", b"\t")}.get(
            kind, LINES
        )
        if path.suffix == ".zip":
            with zipfile.ZipFile(path, "w") as file:
                file.writestr("rows" + kind, content)
        else:
            path.write_bytes(COMPRESSED.get(path.suffix[1:], bytes)(content))
    return path


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "ending",
    "jsonl ndjson json csv tsv parquet arrow JSONL jsonl.gz jsonl.bz2 jsonl.xz jsonl.zip csv.gz tsv.xz json.gz".split(),
)
def test_files_are_read_by_their_ending(tmp_path, ending, stream):
    """Compressed or not, whole or as a stream."""
    path = write(tmp_path / f"a.{ending}")
    assert list(read_table(str(path), stream=stream)) == ROWS
    if not stream:
        assert read_examples(str(path), limit=3) == ROWS[:3]


def test_every_line_of_a_text_file_is_an_example(tmp_path):
    """With the key text."""
    (tmp_path / "a.txt").write_text("one two\nthree\n", encoding="utf-8")
    assert read_examples(str(tmp_path / "a.txt")) == [{"text": "one two"}, {"text": "three"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl.gz", None, "a.jsonl.gz does not exist"),
        ("b.jsonl.gz", b"", "has no examples"),
        ("c.jsonl.gz", gzip.compress(b"", mtime=0), "has no examples|at least one example"),
        ("d.jsonl.gz", LINES, "Not a gzipped file"),
        ("e.jsonl.gz", gzip.compress(LINES, mtime=0)[:-20], "cannot be read"),
        ("f.gz", gzip.compress(LINES, mtime=0), r"f.gz must end in one of .jsonl, .*compressed"),
        ("g.dat", LINES, r"g.dat must end in one of .jsonl, "),
    ],
)
def test_unreadable_files_are_refused_with_the_reason(tmp_path, name, content, message):
    """Missing, empty, damaged, or of an unknown ending."""
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BlueprintError, match=message):
        read_table(str(tmp_path / name))


@pytest.fixture
def questions(tmp_path):
    """A data set with two configurations, in the layout of the Hub."""
    folder = tmp_path / "questions"
    for config, split in (("main", "train"), ("main", "test"), ("socratic", "train")):
        (folder / config).mkdir(parents=True, exist_ok=True)
        rows = [{"question": f"{config} {split}", "answer": "2"}]
        Dataset.from_list(rows).to_parquet(folder / config / f"{split}-00000-of-00001.parquet")
    files = [
        {"config_name": "main", "data_files": [{"split": s, "path": f"main/{s}-*"} for s in ("train", "test")]},
        {"config_name": "socratic", "data_files": "socratic/train-*"},
    ]
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(files)}\n---\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize("stream", [False, True])
def test_a_configuration_follows_a_colon(questions, stream):
    """And each has its splits."""
    for config, split in (("main", "train"), ("main", "test"), ("socratic", "train")):
        [row] = read_table(f"{questions}:{config}", split=split, stream=stream)
        assert row["question"] == f"{config} {split}"
    columns = {"prompt": "question", "completion": "answer"}
    assert read_examples(f"{questions}:main", columns) == [{"prompt": "main train", "completion": "2"}]


@pytest.mark.parametrize(
    ("suffix", "split", "message"),
    [
        ("", "train", r"has several configurations: 'main', 'socratic'\. Name one, as in '.*questions:main'"),
        (":mian", "train", r"'mian' not found\. Available: \['main', 'socratic'\]"),
        (":socratic", "test", r"Unknown split \"test\"\. Should be one of \['train'\]"),
    ],
)
def test_a_missing_configuration_is_asked_for_by_name(questions, suffix, split, message):
    """As is another split."""
    with pytest.raises(BlueprintError, match=message):
        read_table(f"{questions}{suffix}", split=split)


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("openai/gsm8k:main", ("openai/gsm8k", "main")),
        ("qiaojin/PubMedQA:pqa_labeled", ("qiaojin/PubMedQA", "pqa_labeled")),
        ("org/plain", ("org/plain", None)),
        ("squad:plain_text", ("squad", "plain_text")),
    ],
)
def test_an_id_on_the_hub_names_its_configuration_alike(monkeypatch, source, asked):
    """It is not part of the repository's name."""
    calls = []
    monkeypatch.setattr("datasets.load_dataset", lambda *words, **_: calls.append(words) or Dataset.from_list(ROWS))
    assert read_examples(source) == ROWS and calls == [asked]
