"""
data.py: what it says of a file whose rows all share a mistake, of another format and of rows of another shape. The two
lines of Python in a message are run, and the file that they write is loaded.
"""

import bz2
import gzip
import json
import lzma
import time
import zipfile

import pytest

from data import (DataError, load_comparisons, load_demonstrations, load_prompts, read_rows, shared_mistakes, to_row)
from files import write
from tokenizer import get_tokenizer

BYTES = get_tokenizer("bytes")


# -----------------------------------------------------------------------------------------------------------
# mistakes that nearly every row shares

def warnings_of(rows, n_responses=1):
    return shared_mistakes([to_row(row, n_responses) for row in rows])


def demonstrations(prompt="Where is {}?", response=" In {}.", n=20):
    return [{"prompt": prompt.replace("{}", f"P{i}"), "response": response.replace("{}", f"Q{i}")} for i in range(n)]


TOKENS = ["<|endoftext|>", "</s>", "<s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "[INST]",
          "[/INST]", "<<SYS>>", "<eos>", "<bos>", "<pad>", "<end_of_turn>", "<｜end▁of▁sentence｜>", "[SEP]", "[EOS]"]


@pytest.mark.parametrize("token", TOKENS)
def test_a_token_in_every_row_is_reported_as_the_text_that_it_is(tmp_path, token):
    rows = demonstrations(response=" {}" + token)
    path = write(tmp_path / "d.jsonl", *rows)
    split = load_demonstrations(path, BYTES, 256)
    assert len(split.train) + len(split.heldout) == 20  # and the rows are kept as they are
    (line,) = split.report[1:]
    assert line.startswith("warning: 20 of 20 rows have a token's name, which is ordinary text here") and token in line
    assert line.endswith(": remove it, each response gets its EOS") and "\n" not in line and "; " not in line
    assert load_prompts(path, BYTES, 256, 8).report[1:] == [line]
    pairs = write(path, *({"prompt": row["prompt"], "chosen": " x", "rejected": row["response"]} for row in rows))
    assert len(load_comparisons(pairs, BYTES, 256).report) == 2
    assert warnings_of([{"prompt": f"{token} {i}"} for i in range(10)], 0)
    assert warnings_of([{"text": f"{i} {token}"} for i in range(10)])
    assert not warnings_of([rows[0], *demonstrations()])  # a lone one is text and nothing else


MISTAKES = [
    ("no space between prompt and response", "capital?Paris", {"prompt": "A capital?", "response": "Paris"}),
    ("no space between prompt and response", "ГдеМосква", {"prompt": "Где", "response": "Москва"}),
    ("no space between prompt and response", "?Rome", {"prompt": "A capital?", "chosen": " Paris", "rejected": "Rome"}),
    ("no space between prompt and response", "Assistant:Hello", {"prompt": "Assistant:", "response": "Hello"}),
    ("a space at the end of the prompt", "Q: ", {"prompt": "Q: ", "response": "1"}),
    ("a response that repeats its prompt", "2 + 2", {"prompt": "2 + 2 =", "response": "2 + 2 = 4"}),
    ("a response that repeats its prompt", "2 + 2", {"prompt": "2 + 2 =", "response": "\n2 + 2 = 4"}),
    (r"\n as two characters", "", {"prompt": "a\\nb", "response": " c"}),
    (r"\n as two characters", "", {"prompt": "ab", "response": " c\\nd"}),
    ("HTML", "&#39;", {"prompt": "it&#39;s", "response": " so"}),
    ("HTML", "<br />", {"text": "one<br /><br />two"}),
    ("garbled characters", "cafÃ©", {"prompt": "the cafÃ©", "response": " is"}),
    ("garbled characters", "â€™", {"prompt": "itâ€™s", "response": " so"}),
    ("a placeholder", "{question}", {"prompt": "Q: {question}", "response": " so"}),
    ("an empty response", "", {"prompt": "Q", "response": ""}),
    ("an empty response", "", {"prompt": "Q\n", "chosen": "yes", "rejected": "nan"}),
]
FINE = [
    {"prompt": "Where is Lima?", "response": " In Peru."}, {"prompt": "Where?\n", "response": "Peru"},
    {"prompt": "2+2=", "response": "4"}, {"prompt": "2+2", "response": "=4"}, {"prompt": "首都是哪里？", "response": "北京"},
    {"prompt": "ここは", "response": "東京です"}, {"prompt": "กรุงเทพ", "response": "อยู่ที่ไหน"},
    {"prompt": "say \"", "response": "yes"},
    {"prompt": "首都?", "response": "北京"}, {"prompt": "首都は", "response": "Paris"}, {"prompt": "\n", "response": "\nx"},
    {"prompt": "a\\nb\n", "response": "c"}, {"text": "once"}, {"text": "Once upon a time"},
    {"prompt": "q"}, {"prompt": ""}, {"prompt": "", "response": "Yes"},
    {"prompt": "Write code:\n", "response": "print('a\\n')"},
    {"prompt": "x", "chosen": " yes", "rejected": " no, longer"},
    {"prompt": "a < b and <b> c", "response": " [a] [INSTANCE] | <|> | {x} {} & so"},
    {"prompt": "Ã la Â", "response": " â"},
    {"prompt": "Repeat: word", "response": " word"}, {"prompt": "Is it null?", "response": " null value"},
]


@pytest.mark.parametrize("what, shown, row", MISTAKES, ids=range(len(MISTAKES)))
def test_a_mistake_that_nearly_every_row_shows_is_said_once(what, shown, row):
    other = {"prompt": "How?", "response": " So.\n"}
    (line,) = warnings_of([row] * 90 + [other] * 10)
    assert line.startswith(f"warning: 90 of 100 rows have {what}") and shown in line and len(line) < 200
    assert warnings_of([row] * 89 + [other] * 11) == []
    assert warnings_of([row] * 9) == [] and len(warnings_of([row] * 10)) == 1


def test_a_large_file_is_counted_exactly_and_sampled_if_nothing_is_wrong(monkeypatch):
    bad, fine = ({"prompt": "q", "response": text} for text in (" a</s>", " a"))
    (line,) = warnings_of([fine if i % 19 == 1 else bad for i in range(30_001)])
    assert line.startswith("warning: 28,422 of 30,001 rows have")
    calls = []

    class Pattern:
        def search(self, text):
            calls.append(text)
    monkeypatch.setattr("data.SHARED_MISTAKES", [("", Pattern(), "")])
    assert warnings_of([fine] * 30_000) == [] and 100 < len(calls) <= 1000


@pytest.mark.parametrize("row", FINE, ids=range(len(FINE)))
def test_what_is_no_mistake_is_not_reported(row):
    assert warnings_of([row] * 20, 0) == []


def test_looking_for_mistakes_is_linear_in_the_text():
    """A pattern that takes quadratic time would need a minute for one of these rows."""
    odd = [" ", "\n", "a", "\\n", "<|", "{", "&#1", "</", "Ã", "\x00", "1 ", "\x01 ", " \x00", ".\x00"]
    for a, b in [*((a, a) for a in odd), *((a, "x") for a in odd), *(("x", a) for a in odd)]:
        row = to_row({"prompt": a * (100_000 // len(a)), "response": b * (100_000 // len(b)) + "\n"}, 1)
        began = time.process_time()
        shared_mistakes([row] * 10)
        assert time.process_time() - began < 5, (a, b)


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
                                       ({"k" * 40 + str(i): i for i in range(9)},
                                        ", ".join(['"' + "k" * 30 + '"'] * 6))])
def test_a_row_of_no_known_shape_is_told_its_keys(tmp_path, row, keys):
    with pytest.raises(DataError) as error:
        load_demonstrations(write(tmp_path / "x.jsonl", row), BYTES, 256)
    assert f'missing key "prompt" (the row has {keys})' in str(error.value)
    assert len(str(error.value)) < 340 + len(str(tmp_path))
