import csv
import gzip
import json
import lzma
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, List, Value
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from bfpo.config.recipes import Source
from bfpo.data.rows import SourceRow, local_files, read_prompts, read_rows
from bfpo.errors import DataError

ROWS = [
    {"prompt": "a red box?", "chosen": "yes, with\na lid", "rejected": "no"},
    {"prompt": 'a "blue" ball, or two?', "chosen": "ünïcödé 字", "rejected": "maybe"},
]


def in_json(rows):
    return json.dumps(rows)


def in_jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def in_csv(rows, path):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path.read_text(encoding="utf-8")


@pytest.fixture
def write(tmp_path):
    """Return a function that writes text or bytes under a name, compressed as the name says."""

    def written(name, content):
        data = content.encode() if isinstance(content, str) else content
        compress = {".gz": gzip.compress, ".xz": lzma.compress}.get((tmp_path / name).suffix, bytes)
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(compress(data))
        return str(tmp_path / name)

    return written


def read(path, **options):
    return list(read_rows(Source(path=path, **options)))


def values(path, **options):
    return [row.values for row in read(path, **options)]


def refused(path, **options):
    with pytest.raises(DataError) as caught:
        read(path, **options)
    return str(caught.value)


@pytest.mark.parametrize("compression", ["", ".gz", ".xz"])
@pytest.mark.parametrize("kind", ["json", "jsonl", "csv"])
def test_every_kind_of_text_file_gives_the_same_rows(kind, compression, write, tmp_path):
    text = {"json": in_json, "jsonl": in_jsonl, "csv": lambda rows: in_csv(rows, tmp_path / "plain")}[kind](ROWS)
    assert values(write(f"rows.{kind}{compression}", text)) == ROWS


def test_parquet_gives_the_same_rows(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    assert values(str(tmp_path / "rows.parquet")) == ROWS


def test_class_labels_are_read_by_their_names(tmp_path, monkeypatch):
    # datasets#3578: the class 0 of these columns is 'safe', so the number alone would be read as unsafe.
    names = {"is_chosen_safe": ["safe", "unsafe"], "is_rejected_safe": ["unsafe", "safe"]}
    features = Features(
        {"prompt": Value("string")} | {column: ClassLabel(names=list(labels)) for column, labels in names.items()}
    )
    content = {"prompt": ["a", "b", "c"], "is_chosen_safe": [0, 1, 0], "is_rejected_safe": [0, 1, -1]}
    dataset = Dataset.from_dict(content, features=features)
    path = str(tmp_path / "rows.parquet")
    dataset.to_parquet(path)
    expected = [("safe", "unsafe"), ("unsafe", "safe"), ("safe", None)]
    assert [(row["is_chosen_safe"], row["is_rejected_safe"]) for row in values(path)] == expected
    assert [row.label("is_chosen_safe") for row in read(path)] == [True, False, True]
    monkeypatch.setattr("datasets.load_dataset", lambda *arguments, **options: dataset)
    assert values("org/name") == values(path)
    metadata = {b"huggingface": b'{"info": {"features": {"label": {"_type": "ClassLabel", "names": ["safe"]}}}}'}
    table = pa.table({"label": [0, 3]})
    pq.write_table(table.replace_schema_metadata(metadata), path)
    assert refused(path) == f"{path} row 2: column 'label' is 3; its classes are safe"
    pq.write_table(table.replace_schema_metadata({b"huggingface": b"["}), path)
    assert "the metadata of `datasets` in a parquet file can't be read" in refused(path)


def test_class_labels_inside_lists_and_objects_have_their_names(tmp_path, monkeypatch):
    label = ClassLabel(names=["safe", "unsafe"])
    features = Features({"labels": List(label), "judged": {"label": label, "by": Value("string")}})
    content = {"labels": [[0, 1], [-1]], "judged": [{"label": 0, "by": "a"}, {"label": 1, "by": "b"}]}
    dataset = Dataset.from_dict(content, features=features)
    path = str(tmp_path / "rows.parquet")
    dataset.to_parquet(path)
    assert values(path) == [
        {"labels": ["safe", "unsafe"], "judged": {"label": "safe", "by": "a"}},
        {"labels": [None], "judged": {"label": "unsafe", "by": "b"}},
    ]
    monkeypatch.setattr("datasets.load_dataset", lambda *arguments, **options: dataset)
    assert values("org/name") == values(path)


def test_the_kind_of_a_file_is_read_in_any_case(write):
    assert values(write("ROWS.JSONL", in_jsonl(ROWS))) == ROWS


def test_rows_know_file_and_number(write):
    path = write("rows.jsonl", '{"a": 1}\n\n{"a": 2}\n')
    assert [row.where for row in read(path)] == [f"{path} row 1", f"{path} row 3"]


def test_a_missing_line_break_at_the_end_of_a_whole_row_is_fine(write):
    assert values(write("rows.jsonl", in_jsonl(ROWS).rstrip("\n"))) == ROWS


def test_line_breaks_of_windows_are_fine(write):
    assert values(write("rows.jsonl", in_jsonl(ROWS).replace("\n", "\r\n"))) == ROWS


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv"])
def test_a_byte_order_mark_is_not_part_of_the_first_column(kind, write):
    text = {"json": in_json, "jsonl": in_jsonl, "csv": lambda rows: "a,b\n1,2\n"}[kind]([{"a": "1", "b": "2"}])
    assert values(write(f"rows.{kind}", b"\xef\xbb\xbf" + text.encode())) == [{"a": "1", "b": "2"}]


def test_a_pattern_reads_all_matches_in_order(write, tmp_path):
    for name in ("part_2.jsonl", "part_1.jsonl", "other.jsonl", "deeper/part_3.jsonl"):
        write(name, in_jsonl([{"name": name}]))
    assert values(f"{tmp_path}/part_*.jsonl") == [{"name": "part_1.jsonl"}, {"name": "part_2.jsonl"}]
    assert values(f"{tmp_path}/**/part_3.jsonl") == [{"name": "deeper/part_3.jsonl"}]


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(write):
    assert values(write("rows[1].jsonl", in_jsonl(ROWS))) == ROWS


def test_several_files_of_several_kinds_follow_one_another(write):
    paths = [write("b.json", in_json(ROWS[:1])), write("a.jsonl", in_jsonl(ROWS[1:]))]
    assert values(paths) == ROWS
    assert [str(file) for file in local_files(Source(path=paths))] == paths


def test_columns_are_renamed_to_what_the_adapter_expects(write):
    path = write("rows.jsonl", '{"question": "q", "best": "b", "worst": "w"}\n')
    renames = {"prompt": "question", "chosen": "best"}
    assert values(path, columns=renames) == [{"prompt": "q", "chosen": "b", "worst": "w"}]


def test_two_columns_can_change_places(write):
    path = write("rows.jsonl", '{"chosen": "a", "rejected": "b"}\n')
    assert values(path, columns={"chosen": "rejected", "rejected": "chosen"}) == [{"chosen": "b", "rejected": "a"}]


def test_a_rename_from_a_column_that_is_not_there_names_those_that_are(write):
    path = write("rows.jsonl", '{"question": "q", "best": "b"}\n')
    message = refused(path, columns={"prompt": "query"})
    assert message == f"{path} row 1: columns: no column 'query'; the columns are question, best"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nothing.jsonl", "path 'nothing.jsonl': no such file, and not a hub id (org/name)"),
        ("data/nothing.jsonl", "path 'data/nothing.jsonl': no such file, and not a hub id (org/name)"),
        ("data/nothing.csv.gz", "path 'data/nothing.csv.gz': no such file, and not a hub id (org/name)"),
        ("org/name/more", "path 'org/name/more': no such file, and not a hub id (org/name)"),
        ("nothing_*.jsonl", "path 'nothing_*.jsonl' matches no file"),
        ("folder", "path 'folder' is a folder; name its files, or a pattern such as 'folder/*.jsonl'"),
    ],
)
def test_a_path_to_nothing_says_so(path, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    assert refused(path) == message


BAD_FILES = {
    "unknown suffix": (
        "rows.xlsx",
        "a\tb\n",
        "unknown file format; expected .json, .jsonl, .csv, .tsv, .parquet, optionally",
    ),
    "no suffix": ("rows", "{}", "unknown file format"),
    "empty json": ("rows.json", "", " has no rows"),
    "empty list": ("rows.json", "[]", " has no rows"),
    "empty jsonl": ("rows.jsonl", "", " has no rows"),
    "blank jsonl": ("rows.jsonl", "\n\n", " has no rows"),
    "empty csv": ("rows.csv", "", " has no rows"),
    "only a header": ("rows.csv", "a,b\n", " has no rows"),
    "empty gz": ("rows.jsonl.gz", "", " has no rows"),
    "an object": ("rows.json", '{"a": 1}', " is a dict; expected a list of rows"),
    "cut json": ("rows.json", '[{"a": 1}, {"a"', "not JSON (Expecting ':' delimiter at line 1, column 16)"),
    "jsonl called json": (
        "rows.json",
        '{"a": 1}\n{"a": 2}\n',
        "at line 2, column 1); the suffix for one object per line is .jsonl",
    ),
    "an incomplete line": (
        "rows.jsonl",
        '{"a": 1}\n{"a": ',
        "row 2: not JSON (Expecting value at column 7); the last line is",
    ),
    "a bad line": ("rows.jsonl", '{"a": }\n{"a": 1}\n', "row 1: not JSON (Expecting value at column 7)"),
    "a number": ("rows.jsonl", '{"a": 1}\n12\n', "row 2: int; expected an object with columns"),
    "a list": ("rows.json", '[{"a": 1}, ["a"]]', "row 2: list; expected an object with columns"),
    "a null row": ("rows.jsonl", "null\n", "row 1: NoneType; expected an object with columns"),
    "a short row": ("rows.csv", "a,b\n1,2\n1\n", "row 2: expected as many fields as the header has (a, b)"),
    "a long row": ("rows.csv", "a,b\n1,2,3\n", "row 1: expected as many fields as the header has (a, b)"),
    "an open quote": ("rows.csv", 'a,b\n1,"2\n', "line 2: not CSV (unexpected end of data)"),
    "a column twice": ("rows.csv", "a,b,a\n1,2,3\n", "duplicate column 'a' in the header; rename one"),
    "not utf-8": ("rows.csv", "a,b\n1,ü\n".encode("latin-1"), "not UTF-8 text ('utf-8' codec can't decode byte 0xfc"),
    "utf-16": ("rows.jsonl", '{"a": 1}\n'.encode("utf-16"), "not UTF-8 text ('utf-8' codec can't decode byte 0xff"),
    "empty parquet": ("rows.parquet", "", "not a parquet file, or damaged ("),
    "text as parquet": ("rows.parquet", "a,b\n1,2\n" * 9, "not a parquet file, or damaged ("),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_refused_with_where_and_what(name, content, message, write):
    path = write(name, content)
    got = refused(path)
    assert got.startswith(path)
    assert message in got
    assert ("is incomplete" in got) == (content == '{"a": 1}\n{"a": ')


@pytest.mark.parametrize("suffix", ["gz", "xz"])
def test_a_cut_compressed_file_is_refused(suffix, write, tmp_path):
    path = write(f"rows.jsonl.{suffix}", in_jsonl(ROWS * 50))
    whole = (tmp_path / f"rows.jsonl.{suffix}").read_bytes()
    (tmp_path / f"rows.jsonl.{suffix}").write_bytes(whole[:-20])
    assert refused(path).startswith(f"{path}: the compressed file is truncated or damaged (")


def test_a_compressed_file_that_is_none_is_refused(tmp_path):
    (tmp_path / "rows.jsonl.gz").write_text('{"a": 1}\n')
    assert refused(str(tmp_path / "rows.jsonl.gz")).endswith("(Not a gzipped file (b'{\"')); get it again")


def test_a_damaged_parquet_file_is_refused(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"a": list(range(5000))}), path, compression="none", use_dictionary=False)
    whole = path.read_bytes()
    path.write_bytes(whole[:4] + bytes(2000) + whole[2004:])
    assert refused(str(path)).startswith(f"{path}: not a parquet file, or damaged (")


def test_hub_options_are_passed_on_and_rows_know_their_split(monkeypatch):
    calls = []

    def load_dataset(path, name=None, *, split=None, revision=None):
        calls.append((path, name, split, revision))
        return Dataset.from_list(ROWS)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    rows = read("org/name", name="part", split="test", revision="abc123")
    assert [row.values for row in rows] == ROWS
    assert rows[1].where == "org/name[test] row 2"
    read("org/name")
    assert calls == [("org/name", "part", "test", "abc123"), ("org/name", None, "train", None)]


@pytest.mark.parametrize(
    "error",
    [
        DatasetNotFoundError("Dataset 'org/name' doesn't exist on the Hub\nand more lines"),
        DatasetGenerationError("An error occurred while generating the dataset"),
        ConnectionError("Couldn't reach 'org/name' on the Hub"),
        ValueError("Unknown split \"trian\". Should be one of ['train']."),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_the_hub_complains_of_is_one_line(error, monkeypatch):
    def load_dataset(*_, **__):
        raise error

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    first = str(error).partition("\n")[0]
    assert refused("org/name", split="trian") == f"hub data set 'org/name' (split trian): {first}"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("prompts.txt", "how big is a box?\n\n  where is the door? \n"),
        ("prompts.csv", "id,goal\n1,how big is a box?\n2,where is the door?\n"),
        ("prompts.json", '[{"question": "how big is a box?"}, {"instruction": "where is the door?"}]'),
        ("prompts.jsonl", '{"prompt": "how big is a box?", "goal": "x"}\n{"prompt": "where is the door?"}\n'),
        (
            "prompts.jsonl",
            '{"prompt": [{"role": "user", "content": "how big is a box?"}]}\n{"prompt": "where is the door?"}\n',
        ),
    ],
)
def test_benchmark_prompts_are_read_from_lines_and_columns(name, content, write):
    assert list(read_prompts(write(name, content))) == ["how big is a box?", "where is the door?"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("prompts.txt", "\n \n", " has no prompts"),
        ("prompts.csv", "id,text\n1,a\n", " row 1: no column 'prompt', 'instruction', 'question' or 'goal'"),
        ("prompts.jsonl", '{"prompt": ["a"]}\n', " row 1: column 'prompt': turn 'a'; expected"),
    ],
)
def test_a_benchmark_without_prompts_is_refused(name, content, message, write):
    path = write(name, content)
    with pytest.raises(DataError, match=re.escape(path + message)):
        list(read_prompts(path))


@pytest.mark.parametrize(
    ("value", "number"), [(1, 1.0), ("0.25", 0.25), ("", None), (None, None), (float("nan"), None), (True, 1.0)]
)
def test_an_optional_number_may_be_absent_in_several_ways(value, number):
    assert SourceRow({"score": value}, "here").number("score") == number
    assert SourceRow({}, "here").number("score") is None


@pytest.mark.parametrize("value", ["high", [1], {"a": 1}, 10**400])
def test_what_is_not_a_number_is_refused(value):
    with pytest.raises(DataError, match=r"column 'score' is .*; expected a number"):
        SourceRow({"score": value}, "here").number("score")


@pytest.mark.parametrize("value", [2, True, "x", None, 0.5, [1]])
def test_a_choice_takes_only_what_is_allowed(value):
    with pytest.raises(DataError, match=r"column 'better' is .*; expected 0 or 1"):
        SourceRow({"better": value}, "here").choice("better", (0, 1))
    assert [SourceRow({"better": good}, "here").choice("better", (0, 1)) for good in (0, "1", 1.0)] == [0, 1, 1]
