"""Mutations of values, of tables and of bytes, all drawn from one random generator."""

import copy
import csv
import gzip
import io
import json
import lzma

import yaml

LONG_DIGITS = "9" * 5000
# Stands for a value that is nested too deeply to be written by `json.dumps`; in other formats it is a text.
DEEP = '"a value that is nested deeply"'
VALUES = (
    None, True, False, 0, 1, -1, 2, 0.5, 1.5, 1e308, -1e-320, 10**30, -(10**19), float("nan"), float("inf"),
    float("-inf"), "", " ", "x", "0", "1", "-1", "nan", "null", "true", "no", "NO", "1e999", "é", "e\u0301",
    "\u202enpe", "\x00", "a\x00b", "\x1b[2J", "\ufeff", "\u2028", "\x85", "=1+1", "../..", "/", "/dev/null",
    "a" * 300,
    "a/b", "{{ 7*7 }}", "[", "%s {} {0}", "\U0001f600", "٣", "²", [], {}, [[]], [None], [1], ["x"], {"x": 1},
    {"": None}, [{}], {"role": "user"}, [{"role": "user", "content": "x"}], [{"role": "user", "content": 1}],
    [{"role": ["user"], "content": "x"}], [{"role": {}, "content": "x"}], [{"role": "tool", "content": None}],
)  # fmt: skip
LONE_SURROGATES = ("\ud800", "x\udc00y", ["\udfff"], {"\ud83d": 1})
YAML_TEXTS = (
    "&a [*a]\n", "a: &a {b: *a}\n", "<<: 1\n", "<<: [1]\n", "? [1]\n: 2\n", "? {a: 1}\n: 2\n",
    "!!python/object:os.system x\n",
    "!!python/name:os.system\n", "!!binary x\n", "!!timestamp 2001-13-45\n", "x: 2001-13-45\n", "x: 0b\n", "x: 0x\n",
    "x: 1:99:99\n", "x: !!int x\n", "x: !!float y\n", "x: !!bool z\n", "x: !!set {a, b}\n", "x: !!omap [a: 1, 1]\n",
    "x: !!pairs 1\n", "%YAML 3.0\n---\n", "---\n---\n", "...\n", "\t\n", "x: |\n", "!!null x\n", "*missing\n",
    "x: 2001-01-01 25:61:61\n", "x: 190:20:30\n", "= \n", "x: =\n", "x: .inf\n", "x: 1_0e1_0\n", "x: -.e5\n",
    "x: 0o9\n",
    "1: 2\n", "null: 2\n", "true: 1\n", "2001-01-01: 1\n", "1.5: x\n", "~: ~\n", f"x: {LONG_DIGITS}\n",
    "a: &a [x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b]\nd: [*c,*c,*c]\n",
)  # fmt: skip
BYTES = (
    b"\x00", b"\xff", b"\xef\xbb\xbf", b"\r", b"\r\n", b"\n\n", b"\xe2\x80\xa8", b"\xc2\x85", b'"', b"\\", b"{",
    b"}", b"[",
    b"]", b",", b":", b"'", b"\t", b"#", b"&", b"*", b"!", b"%", b"@", b"`", b"|", b">", b"-", b"NaN", b"Infinity",
    b"-Infinity",
    b"1e999", b"null", b"\\ud800", b"\\u0000", b"\x1a", b"\xc3", b"\xed\xa0\x80", b"\xf0\x9f\x98",
    LONG_DIGITS.encode(),
    b"[" * 3000, b'{"a":' * 3000, b"[" * 200_000, b"- " * 2000,
)  # fmt: skip
FORMATS = ("jsonl", "json", "csv", "tsv", "parquet", "jsonl.gz", "jsonl.xz", "csv.gz")


def places(content, path=()):
    """Return the path of every value inside a list or an object."""
    keys = content if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ()
    paths = []
    for key in keys:
        paths.append((*path, key))
        paths += places(content[key], (*path, key))
    return paths


def nested(rng):
    """Return a deeply nested value."""
    value = "x"
    for _ in range(rng.choice((5, 20, 60))):
        value = [value] if rng.random() < 0.5 else {"a": value}
    return value


def deep(text, rng):
    """Return a JSON text with each value `DEEP` nested close to the depth at which Python stops to recurse."""
    while DEEP in text:
        depth = rng.randrange(500, 990)
        opening, closing = rng.choice((("[", "]"), ('{"a":', "}")))
        text = text.replace(DEEP, f'{opening * depth}"x"{closing * depth}', 1)
    return text


def json_bytes(content, rng):
    """Return the bytes of a JSON value."""
    return deep(json.dumps(content), rng).encode()


def any_value(rng, *, surrogates=True):
    """Return a value that few readers expect."""
    if rng.random() < 0.04:
        return nested(rng) if rng.random() < 0.6 else json.loads(DEEP)
    if surrogates and rng.random() < 0.06:
        return copy.deepcopy(rng.choice(LONE_SURROGATES))
    return copy.deepcopy(rng.choice(VALUES))


def mutate_value(content, rng, *, surrogates=True):
    """Return a copy of a JSON value with one value changed, deleted, doubled, renamed, swapped or wrapped."""
    content = copy.deepcopy(content)
    paths = places(content)
    if not paths or rng.random() < 0.01:
        return any_value(rng, surrogates=surrogates)
    *path, key = rng.choice(paths)
    parent = content
    for step in path:
        parent = parent[step]
    action = rng.random()
    if action < 0.55:
        parent[key] = any_value(rng, surrogates=surrogates)
    elif action < 0.68:
        del parent[key]
    elif action < 0.76:
        parent[key] = rng.choice(([parent[key]], {"x": parent[key]}, json.dumps(parent[key]), str(parent[key])))
    elif action < 0.84:
        *other, last = rng.choice(paths)
        source = content
        try:
            for step in other:
                source = source[step]
            parent[key] = copy.deepcopy(source[last])
        except (LookupError, TypeError):
            parent[key] = None
    elif isinstance(parent, dict):
        name = rng.choice((f"{key}x", str(key)[:-1], "x", "", "licence", "beta", "é", "\u0000", "__class__", "a.b"))
        parent[name] = parent[key] if action < 0.92 else parent.pop(key)
    else:
        parent.insert(key, copy.deepcopy(parent[key]))
    return content


def mutate_bytes(content, rng):
    """Return bytes that are cut, flipped, overwritten, doubled, or have something inserted."""
    content = bytearray(content)
    place = rng.randrange(len(content) + 1)
    action = rng.random()
    if action < 0.25:
        del content[place:]
    elif action < 0.4 and content:
        content[min(place, len(content) - 1)] ^= 1 << rng.randrange(8)
    elif action < 0.65:
        content[place:place] = rng.choice(BYTES)
    elif action < 0.75:
        content[place : place + rng.randrange(1, 30)] = rng.choice(BYTES)
    elif action < 0.82:
        del content[place : place + rng.randrange(1, 50)]
    elif action < 0.9:
        lines = bytes(content).splitlines(keepends=True)
        if lines:
            lines.insert(rng.randrange(len(lines) + 1), rng.choice(lines))
        content = bytearray(b"".join(lines))
    elif action < 0.95:
        content = bytearray(bytes(content).replace(b"\n", rng.choice((b"\r\n", b"\r", b"\xc2\x85", b"\n\r", b""))))
    else:
        content = bytearray(
            rng.choice((b"", b"\n", b"null", b"0", b'"x"', b"[]", b"{}", b"\xff\xfe", b"\x1f\x8b", b"PK"))
        )
    return bytes(content)


def mutate_yaml(content, rng):
    """Return the bytes of a YAML file with a mutated mapping."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        content = mutate_value(content, rng)
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=rng.random() < 0.5)
    action = rng.random()
    if action < 0.12:
        extra = rng.choice(YAML_TEXTS)
        text = text + extra if rng.random() < 0.5 else extra + text
    elif action < 0.18:
        lines = text.splitlines(keepends=True)
        text = "".join([*lines, rng.choice(lines)]) if lines else text
    data = text.encode("utf-8", "surrogatepass")
    return mutate_bytes(data, rng) if action > 0.8 else data


def mutate_rows(rows, rng):
    """Return rows of which a few are mutated."""
    rows = copy.deepcopy(rows)
    for _ in range(rng.choice((1, 1, 2, 3))):
        index = rng.randrange(len(rows))
        # A whole column changes its type now and then, as a wrong file's would.
        if rng.random() < 0.2 and isinstance(rows[index], dict) and rows[index]:
            column, value = rng.choice(list(rows[index])), any_value(rng)
            for row in rows:
                if isinstance(row, dict):
                    row[column] = copy.deepcopy(value)
        else:
            rows[index] = mutate_value(rows[index], rng)
    return rows


def table_bytes(rows, file_format, rng=None):
    """Return the bytes of a table in one of `FORMATS`; mutated rows need the generator."""
    base, _, compression = file_format.partition(".")
    if base == "parquet":
        data = _parquet(rows)
    elif base in ("csv", "tsv"):
        data = _csv(rows, "\t" if base == "tsv" else ",")
    elif base == "json":
        data = json_bytes(rows, rng)
    else:
        data = b"".join(json_bytes(row, rng) + b"\n" for row in rows)
    return {"": bytes, "gz": gzip.compress, "xz": lzma.compress}[compression](data)


def mutate_table(rows, file_format, rng):
    """Return the bytes of a table with mutated rows, mutated bytes, or both."""
    action = rng.random()
    if action < 0.7:
        rows = mutate_rows(rows, rng)
    data = table_bytes(rows, file_format, rng)
    return mutate_bytes(data, rng) if action > 0.6 else data


def _csv(rows, delimiter):
    rows = [row for row in rows if isinstance(row, dict)]
    columns = list(dict.fromkeys(str(column) for row in rows for column in row))
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, lineterminator="\n", escapechar="\\")
    writer.writerow(columns)
    for row in rows:
        values = (row.get(column, "") for column in columns)
        writer.writerow(value if isinstance(value, str | int | float) else json.dumps(value) for value in values)
    return text.getvalue().encode("utf-8", "surrogatepass")


def _parquet(rows):
    import pyarrow
    from pyarrow import parquet

    rows = [row for row in rows if isinstance(row, dict)]
    columns = list(dict.fromkeys(str(column) for row in rows for column in row))
    arrays = {}
    for column in columns:
        values = [row.get(column) for row in rows]
        try:
            arrays[column] = pyarrow.array(values)
        except (pyarrow.ArrowException, OverflowError, UnicodeEncodeError, RecursionError):
            texts = [None if value is None else json.dumps(value) for value in values]
            arrays[column] = pyarrow.array(texts)
    buffer = io.BytesIO()
    try:
        parquet.write_table(pyarrow.table(arrays), buffer)
    except (pyarrow.ArrowException, UnicodeEncodeError):
        # Parquet can't hold an empty struct.
        return b"PAR1"
    return buffer.getvalue()
