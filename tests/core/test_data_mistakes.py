"""
data.py: what it says of a file of another format and of rows of another shape. The two lines of Python in a message are
run, and the file that they write is loaded.
"""

import bz2
import gzip
import json
import lzma
import zipfile

import pytest

from data import DataError, load_comparisons, load_demonstrations, load_prompts, read_rows, to_row
from files import write
from tokenizer import get_tokenizer

BYTES = get_tokenizer("bytes")


# -----------------------------------------------------------------------------------------------------------
# other formats, other shapes

def convert(error, tmp_path):
    """Runs the two lines at the end of a message. Returns the file that they write."""
    message, *code = str(error.value).split("\n")
    assert "Two lines of Python" in message and len(code) == 2
    namespace = {}
    for line in code:
        exec(line.strip(), namespace)
    (new,) = set(tmp_path.glob("*.rows.jsonl"))
    assert str(new) in message
    return new


ROWS = [{"prompt": 'Say "hé", it’s\n', "response": "one, two\tthree;\nfour"}, {"prompt": "}\n{", "response": " b"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def as_table(sep, newline="\r\n"):
    quoted = ['"' + text.replace('"', '""') + '"' for row in ROWS for text in row.values()]
    return newline.join([sep.join(ROWS[0]), sep.join(quoted[:2]), sep.join(quoted[2:]), ""]).encode()


def zipped(path):
    with zipfile.ZipFile(path / "z", "w") as file:
        file.writestr("rows.jsonl", LINES)
    return (path / "z").read_bytes()


FORMATS = [
    ("rows.csv", "a CSV file", as_table(",")), ("bom.csv", "a CSV file", b"\xef\xbb\xbf" + as_table(",")),
    ("rows.jsonl", "a CSV file", as_table(",", "\n")), ("rows.csv.gz", "a CSV file", gzip.compress(as_table(","))),
    ("rows.tsv", "a TSV file", as_table("\t")), ("excel.csv", "a CSV file with semicolons", as_table(";")),
    ("rows.xz", "an xz file", lzma.compress(LINES)), ("rows.jsonl.bz2", "a bzip2 file", bz2.compress(LINES)),
    ("rows.jsonl", "a gzip file without .gz", gzip.compress(LINES)), ("rows.zip", "a zip file", zipped),
    ("rows.jsonl", "text in UTF-16", LINES.decode().encode("utf-16")),
    ("rows.json", "a JSON array", json.dumps(ROWS).encode()),
    ("rows.json", "a JSON array", json.dumps(ROWS, indent=1).encode()),
    ("rows.json.gz", "a JSON array", gzip.compress(json.dumps(ROWS, indent=4).encode())),
    ("rows.json", "JSON with several lines for a row", "\n".join(json.dumps(row, indent=2) for row in ROWS).encode()),
    ("FILE NEW 'OPEN'.csv", "a CSV file", as_table(",")),
    ("names.jsonl", "a CSV file", b"id,Prompt\r\n"), ("names.csv", "a CSV file", b"q,a\r\n"),
    ("names.tsv.gz", "a TSV file", gzip.compress(b"q\ta\r\n")),
]


@pytest.mark.parametrize("skip_bad", [False, True])
@pytest.mark.parametrize("name, what, content", FORMATS, ids=[f"{i}-{what}" for i, (_, what, _) in enumerate(FORMATS)])
def test_another_format_is_named_with_the_code_that_converts_it(tmp_path, name, what, content, skip_bad):
    path = tmp_path / name
    path.write_bytes(content(tmp_path) if callable(content) else content)
    with pytest.raises(DataError) as error:
        load_demonstrations(path, BYTES, 256, skip_bad)
    assert str(error.value).startswith(f"{path}: this is {what}") and "malformed" not in str(error.value)
    new = convert(error, tmp_path)
    assert new.read_bytes() == b"" if name.startswith("names") else read_rows(new)[0] == ROWS


@pytest.mark.parametrize("name, what, content, code", [
    ("rows.parquet", "a parquet file", b"PAR1\x15\x04\n\xff", "pandas.read_parquet("),
    ("rows.xlsx", "an Excel file", b"PK\x03\x04" + bytes(26) + b"[Content_Types].xml\n", "pandas.read_excel("),
    ("rows.jsonl.zst", "a zstd file", b"\x28\xb5\x2f\xfd\x04\n\x00", "zstandard.open(")])
def test_formats_that_need_a_package_name_it(tmp_path, name, what, content, code):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        load_prompts(tmp_path / name, BYTES, 256, 8)
    message, *lines = str(error.value).split("\n")
    assert f"this is {what}" in message and code in lines[1] and "pip install" in lines[1]
    compile("\n".join(line.strip() for line in lines), name, "exec")


def test_a_bad_row_later_in_a_file_is_no_format(tmp_path):
    for first in ("PAR1", "prompt,response", '[{"prompt": "q"}]'):
        path = write(tmp_path / "x.jsonl", ROWS[0], first)
        with pytest.raises(DataError, match=r"x.jsonl:2: "):
            load_demonstrations(path, BYTES, 256)
        assert load_demonstrations(path, BYTES, 256, skip_bad=True).train
    for broken in ('{"prompt": "q", "response', '{"a": 1, "prompt"', "[1, 2]", "Once, upon a time"):
        with pytest.raises(DataError, match=r"x.jsonl:1: .*--skip_bad\)$"):
            load_demonstrations(write(path, broken, ROWS[0]), BYTES, 256)


def messages(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


HUMAN = "\n\nUser: {}\n\nAssistant:"
PAIRS = [("q\n", "a", "b"), ("q\n", "a", "c"), ("q\n", "b", "c")]  # in any order
SHAPES = [
    ({"instruction": "Add", "input": "1 2", "output": "3"}, "an Alpaca row", [("Add\n1 2\n", "3")]),
    ({"instruction": "Add", "input": "", "output": "3"}, "an Alpaca row", [("Add\n", "3")]),
    ({"instruction": "Add", "output": "3"}, "an Alpaca row", [("Add\n", "3")]),
    ({"prompt": "q", "completion": " a"}, "a completion row", [("q", " a")]),
    ({"question": "q", "answer": "a"}, 'a demonstration with "question" and "answer"', [("q\n", "a")]),
    ({"question": "q", "chosen": "a", "rejected": "b", "system": ""}, 'a pair with "question"', [("q\n", "a", "b")]),
    ({"question": "q", "answers": ["a", "b", "c"]}, "a ranking .* the best first", PAIRS),
    ({"question": "q", "answers": [{"text": "b", "pm_score": 1}, {"text": "a", "pm_score": 2}]},
     'a ranking .* the highest "pm_score" first', [("q\n", "a", "b")]),
    ({"question": "q", "answers": [{"answer": "b", "rank": 2.0}, {"answer": "a", "rank": 1.0}]},
     'a ranking .* the lowest "rank" first', [("q\n", "a", "b")]),
    ({"prompt": "q\n", "responses": ["c", "a", "b"], "rankings": [3, 1, 2]},
     'a ranking .* the lowest "rankings" first', PAIRS),
    ({"prompt": "q\n", "responses": ["c", "a", "b"], "scores": [0.5, 9, 0.5]},
     'a ranking .* the highest "scores" first', [("q\n", "a", "c"), ("q\n", "a", "b")]),  # equal scores make no pair
    ({"messages": messages("hi", "yes?", "so", "no")}, "chat messages are not supported yet",
     [("\n\nUser: hi\n\nAssistant: yes?" + HUMAN.format("so"), " no")]),
    ({"prompt": messages("hi"), "completion": messages("x", "yes")[1:]}, "chat messages are not supported yet",
     [(HUMAN.format("hi"), " yes")]),
    ({"prompt": messages("hi"), "chosen": messages("x", "yes")[1:], "rejected": messages("x", "no")[1:]},
     "chat messages are not supported yet", [(HUMAN.format("hi"), " yes", " no")]),
    ({"prompt": "hi", "chosen": messages("hi", "yes"), "rejected": messages("hi", "no")},
     "chat messages are not supported yet", [(HUMAN.format("hi"), " yes", " no")]),
    ({"chosen": messages("hi", "yes"), "rejected": messages("hi", "no")},
     "chat messages are not supported yet", [(HUMAN.format("hi"), " yes", " no")]),
]


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz"])
@pytest.mark.parametrize("row, what, expected", SHAPES, ids=range(len(SHAPES)))
def test_another_shape_is_named_with_the_code_that_converts_it(tmp_path, row, what, expected, name):
    path = write(tmp_path / name, row, "", row)
    with pytest.raises(DataError, match=rf"{name}:1: (missing key|.* must be a string).*\({what}") as error:
        load_demonstrations(path, BYTES, 256)
    with pytest.raises(DataError) as skipped:  # all rows have it: nothing is left, so the code is what helps
        load_demonstrations(path, BYTES, 256, skip_bad=True)
    assert str(skipped.value) == str(error.value)
    new = [to_row(row, 1) for row in read_rows(convert(error, tmp_path))[0]]
    assert sorted((row.prompt, *row.responses) for row in new) == sorted(expected * 2)
    split = load_demonstrations(write(path, row, ROWS[0]), BYTES, 256, skip_bad=True)
    assert len(split.train) == 1 and "Two lines" not in split.report[1] and "\n" not in split.report[1]


def test_chat_prompts_alone_are_converted_for_ppo(tmp_path):
    with pytest.raises(DataError, match="chat messages are not supported yet") as error:
        load_prompts(write(tmp_path / "x.jsonl", {"prompt": messages("hi")}), BYTES, 256, 8)
    assert read_rows(convert(error, tmp_path))[0] == [{"prompt": HUMAN.format("hi")}]


@pytest.mark.parametrize("row", [{"prompt": "q", "response": "a"}, {"prompt": "q", "completion": "a"}, {"text": "a"}])
def test_no_code_that_would_not_make_pairs_is_given_to_the_reward_model(tmp_path, row):
    keys = ", ".join(f'"{key}"' for key in row)
    with pytest.raises(DataError, match=rf':1: missing key "chosen" \(the row has {keys}\) \(correct the row'):
        load_comparisons(write(tmp_path / "x.jsonl", row), BYTES, 256)


def test_transcripts_may_have_a_column_of_such_a_name(tmp_path):
    transcripts = {"chosen": "a\n\nAssistant: b", "rejected": "a\n\nAssistant: c", "question": "a"}
    assert load_comparisons(write(tmp_path / "x.jsonl", transcripts), BYTES, 256).train


@pytest.mark.parametrize("row, keys", [({"Prompt": "q", "a\nb": 1}, r'"Prompt", "a\nb"'), ({}, "no keys"),
                                       ({"question": "q", "answers": []}, '"question", "answers"'),
                                       ({"k" * 40 + str(i): 1 for i in range(99)}, ", ".join(['"' + "k" * 30 + '"'] * 6))])
def test_a_row_of_no_known_shape_is_told_its_keys(tmp_path, row, keys):
    with pytest.raises(DataError) as error:
        load_demonstrations(write(tmp_path / "x.jsonl", row), BYTES, 256)
    assert f'missing key "prompt" (the row has {keys})' in str(error.value)
    assert len(str(error.value)) < 340 + len(str(tmp_path))
