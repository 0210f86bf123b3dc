"""
data.py: what every row of a file becomes, or the sentence it is refused with. Files are written to tmp_path;
tests on real data look for it in $PPO_TEST_DATA (default ../shared/data) and skip where it is absent.
"""

import gzip
import json
import random

import numpy as np
import pytest
import torch

import atlas
from data import (BatchOrder, Comparison, DataError, Demonstration, Split, collate_comparisons, collate_demonstrations,
                  collate_prompts, default_max_new_tokens, length_buckets, load_comparisons, load_demonstrations,
                  load_prompts, pad, read_rows, split_rows, spread, to_row)
from files import gpt2, write
from paths import DATA
from tokenizer import get_tokenizer

BYTES = get_tokenizer("bytes")
EOS = 256


def text_of(record):
    """The prompt text of a Demonstration, a Comparison or a prompt, with the bytes tokenizer."""
    return BYTES.decode(getattr(record, "prompt", record))


def pair(i):
    return {"prompt": f"q{i}", "chosen": f" yes {i}", "rejected": f" no {i}"}


# -----------------------------------------------------------------------------------------------------------
# rows that cannot be read

GOOD = {"prompt": "q", "response": " a"}
BAD_ROWS = [
    ('{"prompt": "q"', "malformed JSON (Expecting ',' delimiter, column 15)"),
    ("prompt", "malformed JSON"),
    ('{"prompt": "q", "response": "a"} x', "malformed JSON (Extra data"),
    ("{'prompt': 'q'}", "malformed JSON"),
    ('{"prompt": "a\tb", "response": ""}', "malformed JSON"),
    ([1], "a row must be a JSON object, not list"),
    ('"text"', "a row must be a JSON object, not str"),
    ("null", "a row must be a JSON object, not NoneType"),
    ("7", "a row must be a JSON object, not int"),
    ({}, 'missing key "prompt"'),
    ({"prompt": "q"}, 'missing key "response"'),
    ({"response": "a"}, 'missing key "prompt"'),
    ({"prompt": "q", "chosen": "a"}, 'missing key "rejected"'),
    ({"prompt": "q", "rejected": "a"}, 'missing key "chosen"'),
    ({"prompt": "q", "response": None}, '"response" must be a string, not NoneType'),
    ({"prompt": 3, "response": "a"}, '"prompt" must be a string, not int'),
    ({"prompt": "q", "response": ["a"]}, '"response" must be a string, not list'),
    ({"prompt": {}, "chosen": "a", "rejected": "b"}, '"prompt" must be a string, not dict'),
    ({"prompt": "q", "chosen": "a", "rejected": True}, '"rejected" must be a string, not bool'),
    ({"text": 1.5}, '"text" must be a string, not float'),
    ('{"prompt": "q", "response": NaN}', '"response" must be a string, not float'),
    ('{"prompt": -Infinity, "response": "a"}', '"prompt" must be a string, not float'),
    ('{"prompt": "q", "response": "\\ud83d"}', '"response" has a lone surrogate'),
    ('{"prompt": "\\ude42\\ud83d", "response": ""}', '"prompt" has a lone surrogate'),
    (b'{"prompt": "q", "response": "\xff"}', "byte 30 of the line is not UTF-8"),
    (b'{"prompt": "q", "response": "\xed\xa0\xbd"}', "is not UTF-8"),
    ("[" * 200_000, "too deeply nested"),
    ('{"prompt": ' * 200_000, "too deeply nested"),
    ('{"prompt": "q", "response": "a", "n": ' + "9" * 5000 + "}", "thousands of digits"),
    ({"prompt": " " * 1_000_000 + "x", "response": ""}, '"prompt" has 1,000,001 characters'),
    ({"chosen": "x\n\nAssistant: a", "rejected": "no turn"}, 'no "\\n\\nAssistant:"'),
    ({"chosen": "a", "rejected": "b"}, 'missing key "prompt"'),
]


@pytest.mark.parametrize("bad, reason", BAD_ROWS, ids=range(len(BAD_ROWS)))
def test_bad_rows(tmp_path, bad, reason):
    path = write(tmp_path / "rows.jsonl", GOOD, "", bad, {"prompt": "q2", "response": ""})
    with pytest.raises(DataError) as caught:
        load_demonstrations(path, BYTES, 64)
    message = str(caught.value)
    assert message.startswith(f"{path}:3: ") and reason in message and "--skip_bad" in message
    assert "\n" not in message and len(message) < 300 + len(str(path))
    split = load_demonstrations(path, BYTES, 64, skip_bad=True)
    assert len(split.train) + len(split.heldout) == 2
    assert split.report[-1].startswith(f"skipped 1 bad, the first being {path}:3: ")


def test_a_row_must_have_what_the_stage_needs(tmp_path):
    prompt, demonstration, text = ({"prompt": "q"}, GOOD, {"text": "once"})
    for row in (prompt, demonstration, text):
        with pytest.raises(DataError, match=r':1: missing key "chosen"'):
            load_comparisons(write(tmp_path / "x.jsonl", row), BYTES, 64)
    for row in (prompt, demonstration):
        assert load_prompts(write(tmp_path / "x.jsonl", row), BYTES, 64, 8).train == [[*b"q"]]
    with pytest.raises(DataError, match=r':2: "response" must be a string'):  # needed or not
        load_prompts(write(tmp_path / "x.jsonl", prompt, {"prompt": "q", "response": 1}), BYTES, 64, 8)


def test_nan_is_ignored_in_a_column_that_is_not_used(tmp_path):
    path = write(tmp_path / "x.jsonl", *('{"prompt": "q", "response": "a", "score": [%s]}' % number
                                         for number in ("NaN", "Infinity", "-Infinity")))
    assert load_demonstrations(path, BYTES, 64).train == [Demonstration([*b"q"], [*b"a", EOS])] * 3


def test_bom_crlf_blank_lines_and_unicode_line_breaks(tmp_path):
    plain = b'{"prompt": "q", "response": "a\xe2\x80\xa8b"}\r\n\r\n  \n{"text": "\xc3\xa9"}'
    for name, data in (("plain.jsonl", plain), ("bom.jsonl", b"\xef\xbb\xbf" + plain),
                       ("bom.jsonl.gz", gzip.compress(b"\xef\xbb\xbf" + plain)),
                       ("members.jsonl.gz", gzip.compress(plain[:9]) + gzip.compress(plain[9:]))):
        (tmp_path / name).write_bytes(data)
        rows, bad = read_rows(tmp_path / name)
        assert rows == [{"prompt": "q", "response": "a\u2028b"}, {"text": "é"}] and bad == []
    (tmp_path / "late.jsonl").write_bytes(plain + b"\n\xef\xbb\xbf{}")
    with pytest.raises(DataError, match=r"late.jsonl:5: malformed JSON"):
        read_rows(tmp_path / "late.jsonl")


def test_skip_bad_reports_every_bad_row(tmp_path):
    path = write(tmp_path / "rows.jsonl", *(bad for bad, _ in BAD_ROWS))
    rows, bad = read_rows(path, skip_bad=True, convert=lambda row: to_row(row, 1))
    assert rows == [] and len(bad) == len(BAD_ROWS)
    for line, (message, (_, reason)) in enumerate(zip(bad, BAD_ROWS), 1):
        assert message.startswith(f"{path}:{line}: ") and reason in message
    with pytest.raises(DataError, match=rf"0 usable rows in .*skipped {len(bad)} bad, the first .*:1: "):
        load_demonstrations(path, BYTES, 64, skip_bad=True)


@pytest.mark.parametrize("skip_bad", [False, True])
def test_files_that_skip_bad_does_not_forgive(tmp_path, skip_bad):
    def refused(path, reason):
        with pytest.raises(DataError) as caught:
            load_demonstrations(path, BYTES, 64, skip_bad=skip_bad)
        assert str(caught.value).startswith(f"{path}: ") and reason in str(caught.value)

    refused(tmp_path / "none.jsonl", "No such file")
    refused(tmp_path / "none.jsonl.gz", "No such file")
    refused(tmp_path, "s a directory")
    for name in ("empty.jsonl", "empty.jsonl.gz"):
        (tmp_path / name).write_bytes(b"")
        refused(tmp_path / name, "0 rows")
    for name, data in (("blank.jsonl", b"\n \n\n"), ("bom.jsonl", b"\xef\xbb\xbf")):
        (tmp_path / name).write_bytes(data)
        refused(tmp_path / name, "0 rows")
    refused(write(tmp_path / "blank.jsonl.gz", "", ""), "0 rows")
    (tmp_path / "plain.jsonl.gz").write_bytes(b'{"text": "not zipped"}\n')
    refused(tmp_path / "plain.jsonl.gz", "gzip data is corrupt")


def test_gzip_cut_or_damaged(tmp_path):
    """Never the rows before the cut, and never the blame on a row: each cut is named as what it is."""
    cut = write(tmp_path / "cut.jsonl.gz", *({"text": f"row {i} {i * i}"} for i in range(300)))
    whole = cut.read_bytes()
    size = len(whole)
    for end in [1, 2, 5, 9, 10, 11, 40, size // 3, size // 2, *range(size - 12, size)]:
        cut.write_bytes(whole[:end])
        for skip_bad in (False, True):
            with pytest.raises(DataError, match=r"cut.jsonl.gz: the gzip data is (cut short|corrupt)"):
                read_rows(cut, skip_bad)
    rng = random.Random(0)
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[rng.randrange(10, len(whole))] ^= 1 << rng.randrange(8)
        cut.write_bytes(damaged)
        with pytest.raises(DataError, match=r"cut.jsonl.gz: the gzip data is (cut short|corrupt)"):
            read_rows(cut, skip_bad=True)


def test_fuzz(tmp_path):
    """4,000 mutated lines: each is used or refused with its own line number, and nothing else can happen."""
    rng = random.Random(0)
    seeds = [json.dumps(row, ensure_ascii=flag).encode() for flag in (True, False) for row in (
        pair(1), GOOD, {"text": "é🙂"}, {"prompt": "<|endoftext|>", "source": {"a": [1, None, 1e9, True]}},
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"})]
    splices = [b"NaN", b"\\ud800", b"\xff", b"\xef\xbb\xbf", b"[" * 50, b'"', b"{", b"}", b":", b",", b"null",
               b"\x00", b"9" * 50, b"\\", b"\r", b'"chosen": 1,', b"1e999", b"\xf0\x9f"]
    lines = []
    for _ in range(4000):
        line = bytearray(rng.choice(seeds))
        for _ in range(rng.randrange(4)):
            at = rng.randrange(len(line) + 1)
            match rng.randrange(4):
                case 0: line[at:at + rng.randrange(6)] = b""
                case 1: line[at:at] = rng.choice(splices)
                case 2: line[at:at + 1] = bytes([rng.randrange(256)])
                case 3: line = line[:at] + rng.choice(seeds)[rng.randrange(20):]
        lines.append(bytes(line).replace(b"\n", b" ") or b"{")
    path, used = tmp_path / "fuzz.jsonl", 0
    for n_responses, load in enumerate((lambda: load_prompts(path, BYTES, 256, 8, skip_bad=True),
                                        lambda: load_demonstrations(path, BYTES, 256, skip_bad=True),
                                        lambda: load_comparisons(path, BYTES, 256, skip_bad=True))):
        write(path, *lines)
        rows, bad = read_rows(path, True, lambda row: to_row(row, n_responses))
        blank = sum(not line.removeprefix(b"\xef\xbb\xbf" if i == 0 else b"").strip()
                    for i, line in enumerate(lines))
        assert len(rows) + len(bad) + blank == len(lines)
        assert len(rows) > 500 and len(bad) > 500
        numbers = [int(message.removeprefix(f"{path}:").split(":")[0]) for message in bad]
        assert numbers == sorted(set(numbers)) and 1 <= numbers[0] and numbers[-1] <= len(lines)
        split = load()
        used += len(split.train)
    assert used > 800
    for line in lines[::40]:  # the strict reader, line by line, agrees with the lenient one
        write(path, GOOD, line)
        _, bad = read_rows(path, True, lambda row: to_row(row, 1))
        if bad:
            with pytest.raises(DataError, match="fuzz.jsonl:2: "):
                load_demonstrations(path, BYTES, 256)
        else:
            assert load_demonstrations(path, BYTES, 256).train


# -----------------------------------------------------------------------------------------------------------
# what rows become

def test_row_kinds():
    row = to_row({"prompt": "p", "chosen": "c", "rejected": "r", "source": 1}, 2)
    assert (row.prompt, row.responses, row.problem) == ("p", ("c", "r"), "")
    assert to_row({"prompt": "p", "response": " r "}, 1)[:2] == ("p", (" r ",))
    assert to_row({"text": " t\n"}, 1)[:2] == ("", (" t\n",))
    assert to_row({"prompt": "p", "text": "t"}, 0)[:2] == ("p", ())


def test_transcripts_split_after_the_last_turn():
    start = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    row = to_row({"chosen": start + " d", "rejected": start + ""}, 2)
    assert row[:3] == (start, (" d", ""), "")
    differing = to_row({"chosen": start + " d", "rejected": "\n\nHuman: z\n\nAssistant: e"}, 2)
    assert differing.problem == "the two prompts differ"


def test_drops_are_counted_by_reason(tmp_path):
    hh = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: z\n\nAssistant: b"}
    path = write(tmp_path / "pairs.jsonl", *(pair(i) for i in range(40)), hh, hh,
                 {"prompt": "same", "chosen": "x", "rejected": "x"},
                 {"prompt": "p" * 60, "chosen": "", "rejected": "x"},
                 {"prompt": "long", "chosen": "x", "rejected": "y" * 60},
                 {"prompt": "long", "chosen": "", "rejected": "1"})
    split = load_comparisons(path, BYTES, 50)
    assert len(split.train) + len(split.heldout) == 41
    assert split.report == [f"train: {len(split.train)} rows, held out: {len(split.heldout)}",
                            "dropped 1: chosen equal to rejected", "dropped 2: longer than block_size=50",
                            "dropped 2: the two prompts differ"]
    split = load_demonstrations(path, BYTES, 50)  # what is wrong with `rejected` is no concern here
    assert len(split.train) + len(split.heldout) == 43
    assert split.report[1:] == ["dropped 1: longer than block_size=50", "dropped 2: the two prompts differ"]
    prompts = load_prompts(path, BYTES, 50, 20)
    assert prompts.report[1:] == ["dropped 1: the same prompt again", "dropped 2: the two prompts differ",
                                  "dropped 1: with max_new_tokens=20 and an EOS longer than block_size=50"]


def test_block_size_is_a_bound_that_may_be_reached(tmp_path):
    """4 prompt bytes + 5 response bytes + EOS = 10: kept whole at 10, dropped at 9, cut nowhere."""
    path = write(tmp_path / "d.jsonl", {"prompt": "1234", "chosen": "1", "rejected": "12345"})
    assert load_comparisons(path, BYTES, 10).train[0].responses[1] == [*b"12345", EOS]
    with pytest.raises(DataError, match="0 usable rows in .*; dropped 1: longer .*=9; raise --block_size$"):
        load_comparisons(path, BYTES, 9)
    assert load_demonstrations(path, BYTES, 6).train == [Demonstration([*b"1234"], [*b"1", EOS])]
    with pytest.raises(DataError, match="0 usable rows"):
        load_demonstrations(path, BYTES, 5)
    assert load_prompts(path, BYTES, 10, 5).train == [[*b"1234"]]  # an answer cut after 5 tokens is given an EOS
    with pytest.raises(DataError, match="dropped 1: with max_new_tokens=6 and an EOS longer than block_size=10; raise"):
        load_prompts(path, BYTES, 10, 6)


def test_no_advice_that_would_not_help(tmp_path):
    path = write(tmp_path / "d.jsonl", {"prompt": "q", "chosen": "1", "rejected": "1"})
    with pytest.raises(DataError, match="0 usable rows in .*; dropped 1: chosen equal to rejected$"):
        load_comparisons(path, BYTES, 64)


def test_empty_responses_are_kept(tmp_path):
    path = write(tmp_path / "d.jsonl", {"prompt": "", "chosen": "", "rejected": "x"})
    assert load_comparisons(path, BYTES, 8).train == [Comparison([EOS], [[EOS], [*b"x", EOS]], [(0, 1)])]
    assert load_demonstrations(path, BYTES, 8).train == [Demonstration([EOS], [EOS])]


def test_stages_hold_out_the_same_prompts(tmp_path):
    """One file for three stages: a prompt that one of them trains on is held out by none. Drops differ
    between the stages and must not move the line, nor must the order of the file."""
    rows = [pair(i % 150) | {"chosen": f" yes {i}" * (1 + i % 7)} for i in range(400)]
    path, shuffled = tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"
    write(path, *rows)
    random.Random(0).shuffle(rows)
    write(shuffled, *rows)
    splits = [load_demonstrations(path, BYTES, 48), load_comparisons(path, BYTES, 40),
              load_prompts(path, BYTES, 64, 30), load_comparisons(shuffled, BYTES, 64)]
    assert len({(len(split.train), len(split.heldout)) for split in splits}) > 2  # the drops do differ
    train = set().union(*({text_of(record) for record in split.train} for split in splits))
    heldout = set().union(*({text_of(record) for record in split.heldout} for split in splits))
    assert not train & heldout and len(train) + len(heldout) == 150 and len(heldout) == 7


@pytest.mark.parametrize("n, expected", [(1, 0), (2, 1), (19, 1), (40, 2), (399, 19)])
def test_how_many_are_held_out(n, expected):
    rows = [to_row({"prompt": f"p{i}"}, 0) for i in range(n)] * 3
    train, heldout = split_rows(rows)
    assert len(heldout) == 3 * expected and len(train) == 3 * (n - expected)
    assert split_rows([]) == ([], [])


def test_the_same_prompts_are_held_out_on_every_machine():
    """Python's own hash of a string differs from process to process; these two names must not."""
    heldout = split_rows([to_row({"prompt": f"p{i}"}, 0) for i in range(40)])[1]
    assert [row.prompt for row in heldout] == ["p7", "p37"]


def test_texts_without_prompts_are_split_by_text(tmp_path):
    path = write(tmp_path / "t.jsonl", *({"text": f"story {i % 60}"} for i in range(120)))
    split = load_demonstrations(path, BYTES, 64)
    train, heldout = ({tuple(record.response) for record in side} for side in (split.train, split.heldout))
    assert len(train) == 57 and len(heldout) == 3 and not train & heldout
    with pytest.raises(DataError, match='0 usable .* 120: a "text" without a "prompt"; give rows with "prompt"$'):
        load_prompts(path, BYTES, 64, 8)
    split = load_prompts(write(path, {"text": "once"}, {"prompt": ""}, {"prompt": "q"}), BYTES, 64, 8)
    assert sorted(split.train + split.heldout) == [[*b"q"], [EOS]]  # an empty prompt that was asked for is one
    assert split.report[1:] == ['dropped 1: a "text" without a "prompt"']


def test_prompts_are_kept_once(tmp_path):
    path = write(tmp_path / "p.jsonl", *({"prompt": f"p{i % 10}"} for i in range(30)))
    split = load_prompts(path, BYTES, 64, 8)
    assert sorted(map(text_of, split.train + split.heldout)) == [f"p{i}" for i in range(10)]
    assert split.report == ["train: 9 rows, held out: 1", "dropped 20: the same prompt again"]


def test_a_prompt_carries_its_row_on_the_sides_that_want_it(tmp_path):
    """Its whole dict, whatever the kind of row. Nobody is held out otherwise for it."""
    rows = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b", "n": [i, None, {"x": "\ud83d"}]} for i in range(40)]
    rows += [{"chosen": f"\n\nHuman: {i}\n\nAssistant: a", "rejected": f"\n\nHuman: {i}\n\nAssistant: b"} for i in "xy"]
    path = write(tmp_path / "p.jsonl", *rows)
    plain = load_prompts(path, BYTES, 64, 8)
    for rows_for in ((), ("heldout",), ("train", "heldout")):
        split = load_prompts(path, BYTES, 64, 8, False, rows_for)
        assert split == plain  # as lists of ids, and the report
        for side in ("train", "heldout"):
            found = [prompt.row for prompt in getattr(split, side)]
            expected = [row for row in rows if (row.get("prompt") in ("p7", "p37")) == (side == "heldout")]
            assert found == (expected if side in rows_for else [None] * len(expected))


def test_rows_with_one_prompt_are_several_tasks_where_rows_are_seen(tmp_path):
    """Of equal rows, one is kept, in whatever order their keys are. NaN equals itself here."""
    path = write(tmp_path / "p.jsonl", {"prompt": "q", "answer": 1}, {"prompt": "q", "answer": 2}, {"prompt": "r"},
                 {"answer": 1, "prompt": "q"}, '{"prompt": "r", "answer": NaN}', '{"prompt": "r", "answer": NaN}')
    split = load_prompts(path, BYTES, 64, 8, rows_for=("train", "heldout"))
    assert sorted(map(text_of, split.train + split.heldout)) == ["q", "q", "r", "r"]
    assert split.report[1:] == ["dropped 2: the same row again"]
    q_is_heldout = text_of(split.heldout[0]) == "q"
    split = load_prompts(path, BYTES, 64, 8, rows_for=("heldout",))
    assert [len(split.train), len(split.heldout)] == [1, 2] and q_is_heldout == (text_of(split.heldout[0]) == "q")
    assert split.report[1:] == ["dropped 2: the same prompt again", "dropped 1: the same row again"]


def test_a_prompt_of_the_built_in_task_is_its_row():
    split = load_prompts("atlas", get_tokenizer("atlas"), 64, 16, rows_for=("heldout",))
    assert [prompt.row for prompt in split.heldout] == [{"prompt": prompt} for prompt in atlas.prompts("heldout")]
    assert {prompt.row for prompt in split.train} == {None}


@pytest.mark.parametrize("n, expected", [(1, [0]), (2, [0, 3]), (3, [0, 2, 4]), (6, [0, 1, 2, 3, 4, 5]),
                                         (7, [*range(7)]), (99, [*range(7)]), (0, [])])
def test_rows_are_spread_from_one_end_to_the_other(n, expected):
    assert spread(list(range(7)), n) == expected and spread([], n) == []


def test_examples_are_spread_over_the_rows_held_out_if_there_are_any():
    assert Split(list(range(9)), list(range(100, 125)), []).examples(5) == [100, 105, 110, 115, 120]
    assert Split([1, 2, 3], [7], []).examples(10) == [7]
    assert Split([1, 2, 3], [], []).examples(2) == [1, 2]


def test_atlas():
    encoding = get_tokenizer("atlas")
    split = load_demonstrations("atlas", encoding, 64, seed=3, n=200)
    assert split == load_demonstrations("atlas", encoding, 64, seed=3, n=200)
    assert split.train != load_demonstrations("atlas", encoding, 64, seed=4, n=200).train
    assert len(split.train) == 200 and len(split.heldout) == len(atlas.prompts("heldout"))
    for record in split.heldout:
        prompt, response = encoding.decode(record.prompt), encoding.decode(record.response[:-1])
        assert atlas.is_right(prompt, response) and record.response[-1] == encoding.eot_token
    prompts = load_prompts("atlas", encoding, 64, 16)
    for side in ("train", "heldout"):
        assert [encoding.decode(ids) for ids in getattr(prompts, side)] == atlas.prompts(side)
    with pytest.raises(DataError, match="atlas stores no comparisons"):
        load_comparisons("atlas", encoding, 64)
    with pytest.raises(DataError, match="0 usable rows in atlas .*raise --block_size"):
        load_demonstrations("atlas", encoding, 4, n=10)


# -----------------------------------------------------------------------------------------------------------
# the default length of an answer

def lengths_file(path, lengths, **more):
    return write(path, *({"prompt": f"q{i}", "response": "x" * (n - 1), **more} for i, n in enumerate(lengths)))


def test_default_max_new_tokens(tmp_path):
    path = tmp_path / "x.jsonl"
    assert default_max_new_tokens("atlas", get_tokenizer("atlas"), 64) == 16
    lengths = list(range(1, 102))  # EOS included; the 95 % quantile is 96
    random.Random(0).shuffle(lengths)
    assert default_max_new_tokens(lengths_file(path, lengths), BYTES, 1024) == 96
    assert default_max_new_tokens(path, BYTES, 100) == 50
    assert default_max_new_tokens(lengths_file(path, [5] * 10), BYTES, 1024) == 5
    assert default_max_new_tokens(lengths_file(path, [1, 2]), BYTES, 1024) == 2  # 1.95
    assert default_max_new_tokens(lengths_file(path, [1]), BYTES, 1024) == 1
    assert default_max_new_tokens(path, BYTES, 1) == 1
    pairs = [{"prompt": "q" * 99, "chosen": "x" * 4, "rejected": "x" * 9}, {"chosen": "a\n\nAssistant:x", "rejected":
             "a\n\nAssistant:y"}]
    assert default_max_new_tokens(write(path, pairs[0]), BYTES, 1024) == 10  # 9.75
    assert default_max_new_tokens(write(path, pairs[1]), BYTES, 1024) == 2
    for row in ({"prompt": "q"}, {"text": "x" * 500}):
        path = write(tmp_path / "x.jsonl", row)
        assert [default_max_new_tokens(path, BYTES, size) for size in (1, 64, 128, 1024)] == [1, 32, 64, 64]
    path = write(path, {"prompt": "q", "response": "xx"}, "bad")
    assert default_max_new_tokens(path, BYTES, 1024, skip_bad=True) == 3
    with pytest.raises(DataError, match=":2: malformed"):
        default_max_new_tokens(path, BYTES, 1024)


@pytest.mark.parametrize("n, kind", [(25_000, "response"), (12_000, "pair"), (10_000, "response"),
                                     (10_001, "response")])
def test_default_max_new_tokens_reads_few_responses_of_the_whole_file(tmp_path, monkeypatch, n, kind):
    rows = [{"prompt": "q", "response": "x" * i} if kind == "response" else
            {"prompt": "q", "chosen": "x" * i, "rejected": "y" * i} for i in ([3] * (n // 2) + [7] * (n - n // 2))]
    encoded, path = [], write(tmp_path / "x.jsonl", *rows)

    def encode(encoding, text):
        encoded.append(text)
        return [0] * (len(text) + 1)
    monkeypatch.setattr("data.encode_response", encode)
    assert default_max_new_tokens(path, BYTES, 1024) == 8
    assert 5_000 <= len(encoded) <= 10_000
    assert abs(sum(len(text) == 3 for text in encoded) - len(encoded) / 2) <= 2
    if kind == "pair":
        assert sum("y" in text for text in encoded) == len(encoded) / 2


# -----------------------------------------------------------------------------------------------------------
# batches

def test_pad():
    tokens, lens = pad([[1, 2, 3], [4], []], 9)
    assert tokens.tolist() == [[1, 2, 3], [4, 9, 9], [9, 9, 9]] and lens.tolist() == [3, 1, 0]
    assert tokens.dtype == lens.dtype == torch.long
    assert pad([[1], [2, 3]], 0, width=4)[0].tolist() == [[1, 0, 0, 0], [2, 3, 0, 0]]
    with pytest.raises(ValueError, match="width=1 would cut a row of 2 tokens"):
        pad([[1], [2, 3]], 0, width=1)
    assert [tuple(x.shape) for x in pad([], 0)] == [(0, 0), (0,)]


@pytest.mark.parametrize("pad_id", [0, 5, EOS])  # 5 and EOS are also real tokens of these rows
def test_collate_demonstrations(pad_id):
    batch = [Demonstration([5, 5, 5], [5, EOS]), Demonstration([EOS], [EOS]),
             Demonstration([1, 2], [3, 5, 5, EOS])]
    tokens, prompt_lens, response_lens, mask = collate_demonstrations(batch, pad_id)
    assert prompt_lens.tolist() == [3, 1, 2] and response_lens.tolist() == [2, 1, 4]
    assert tokens.shape == (3, 6)
    assert mask.tolist() == [[True, True, False, False], [True, False, False, False], [True] * 4]
    for row, record in zip(range(3), batch):
        real = prompt_lens[row] + response_lens[row]
        assert tokens[row, :real].tolist() == record.prompt + record.response
        assert (tokens[row, real:] == pad_id).all()
        at_mask = prompt_lens[row] + torch.arange(4)[mask[row]]
        assert tokens[row, at_mask].tolist() == record.response  # EOS included, padding not


@pytest.mark.parametrize("pad_id", [0, 5, EOS])
def test_collate_comparisons(pad_id):
    two = Comparison([5], [[EOS], [5, EOS]], [(0, 1)])
    four = Comparison([1, 2], [[10, EOS], [11, EOS], [12, EOS], [13, 5, EOS]], [(2, 0), (2, 1), (3, 1)])
    tokens, lens, rows, positions, texts, chosen, rejected = collate_comparisons([two, four, two], pad_id)
    assert rows.tolist() == [0, 0, 1, 1, 1, 1, 2, 2] and tokens.shape == positions.shape == texts.shape == (3, 11)
    assert tokens[0].tolist() == [5, EOS, 5, EOS] + [pad_id] * 7
    assert texts[0].tolist() == [0, 1, 2, 2] + [-1] * 7 and positions[0].tolist() == [0, 1, 1, 2] + [0] * 7
    assert texts[1].tolist() == [0, 0, 3, 3, 4, 4, 5, 5, 6, 6, 6] and positions[1].tolist() == [0, 1, *[2, 3] * 4, 4]
    assert collate_comparisons([two, four], pad_id, 8)[0].shape == (2, 16)
    read = []
    for n, (end, row) in enumerate(zip(lens, rows)):
        assert texts[row, end - 1] == n + 1
        read.append([*tokens[row, texts[row] == 0].tolist(), *tokens[row, texts[row] == n + 1].tolist()])
    pairs = [(read[c], read[r]) for c, r in zip(chosen, rejected)]
    assert pairs[0] == pairs[4] == ([5, EOS], [5, 5, EOS])
    assert pairs[1:4] == [([1, 2, 12, EOS], [1, 2, 10, EOS]), ([1, 2, 12, EOS], [1, 2, 11, EOS]),
                          ([1, 2, 13, 5, EOS], [1, 2, 11, EOS])]


def test_collate_prompts():
    prompts, prompt_lens = collate_prompts([[1, 2], [EOS]], EOS)
    assert prompts.tolist() == [[1, 2], [EOS, EOS]] and prompt_lens.tolist() == [2, 1]


LENGTHS = np.random.default_rng(0).integers(1, 200, size=103)


@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize("rows, batch_size", [(103, 8), (103, 103), (5, 16), (1, 3), (12, 4)])
def test_batch_order_is_a_function_of_seed_and_step(rows, batch_size, window):
    """Resuming at any step, or asking in any order, gives what an uninterrupted run saw."""
    run = BatchOrder(LENGTHS[:rows], batch_size, seed=7, window=window)
    seen = [run.order(step) for step in range(40)]
    assert all(batch.shape == (batch_size,) for batch in seen)
    for step in (39, 0, 17, 16, 18, 3):
        assert (run.order(step) == seen[step]).all()
        assert (BatchOrder(LENGTHS[:rows], batch_size, seed=7, window=window).order(step) == seen[step]).all()
    if rows > 1:
        other = BatchOrder(LENGTHS[:rows], batch_size, seed=8, window=window)
        assert any((other.order(step) != seen[step]).any() for step in range(40))


@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize("rows, batch_size", [(103, 8), (5, 16), (12, 4)])
def test_every_row_is_used_equally_often(rows, batch_size, window):
    order = BatchOrder(LENGTHS[:rows], batch_size, seed=1, window=window)
    stream = np.concatenate([order.order(step) for step in range(rows * window)])  # a whole number of epochs
    assert np.bincount(stream, minlength=rows).tolist() == [batch_size * window] * rows
    for steps in range(window, 50, window):  # and at no time is a row more than one use ahead of another
        counts = np.bincount(stream[: steps * batch_size], minlength=rows)
        assert counts.max() - counts.min() <= 1


def test_window_groups_lengths_and_keeps_the_rows():
    plain, grouped = (BatchOrder(LENGTHS, 8, seed=2, window=window) for window in (1, 10))
    def padding(order):
        batches = [LENGTHS[order.order(step)] for step in range(100)]
        return sum((batch.max() - batch).sum() for batch in batches)
    assert padding(grouped) < 0.3 * padding(plain)
    for run in range(10):
        steps = range(10 * run, 10 * run + 10)
        assert (sorted(np.concatenate([plain.order(step) for step in steps]))
                == sorted(np.concatenate([grouped.order(step) for step in steps])))
    means = np.array([LENGTHS[grouped.order(step)].mean() for step in range(100)]).reshape(10, 10)
    assert (np.diff(means) < 0).any(axis=1).all()  # shuffled: no run goes from short to long
    assert len({tuple(run.argsort()) for run in means}) > 1  # and each in its own way


def test_length_buckets_uses_each_row_once_and_pads_only_within_a_pass():
    lens, rows = torch.tensor([5, 2, 9, 2, 7, 4, 8]), torch.tensor([6, 0, 1, 3, 4])
    passes = length_buckets(lens, rows, 2)
    assert [(i.tolist(), T) for i, T in passes] == [([1, 3], 2), ([0, 4], 7), ([6], 8)]
    assert length_buckets(lens, rows, 99)[0][1] == 8


def test_epochs_are_shuffled_differently():
    order = BatchOrder(LENGTHS, 103, seed=0)
    assert sorted(order.order(0)) == sorted(order.order(1)) == list(range(103))
    assert (order.order(0) != order.order(1)).any() and (order.order(0) != np.arange(103)).any()


@pytest.mark.parametrize("lengths, batch_size, window", [([], 4, 1), ([1], 0, 1), ([1], 4, 0)])
def test_batch_order_refuses_nonsense(lengths, batch_size, window):
    with pytest.raises(ValueError, match="must be at least 1"):
        BatchOrder(lengths, batch_size, 0, window)


# -----------------------------------------------------------------------------------------------------------
# real files

PROMPTS_DIFFER, TOO_LONG = "the two prompts differ", "longer than block_size=1024"


@pytest.mark.parametrize("name, rows, losses", [
    ("hh_harmless_base_test", 2312, [{PROMPTS_DIFFER: 5}, {PROMPTS_DIFFER: 5},
                                     {"the same prompt again": 2, PROMPTS_DIFFER: 5}]),
    ("llmbar_mtbench_human_pairs", 619, [{}, {TOO_LONG: 7}, {"the same prompt again": 126}]),
    ("hhh_alignment_pairs", 221, [{}, {TOO_LONG: 2}, {"the same prompt again": 119}]),
])
def test_real_pairs(monkeypatch, name, rows, losses):
    path = DATA / f"{name}.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"no {path.name}")
    encoding = gpt2(monkeypatch)
    splits = [load_demonstrations(path, encoding, 1024), load_comparisons(path, encoding, 1024),
              load_prompts(path, encoding, 1024, 128)]
    for split, expected in zip(splits, losses):
        assert split.report[1:] == [f"dropped {count}: {reason}" for reason, count in expected.items()]
        assert len(split.train) + len(split.heldout) + sum(expected.values()) == rows
    sides = [{tuple(getattr(record, "prompt", record)) for split in splits for record in getattr(split, side)}
             for side in ("train", "heldout")]
    assert not sides[0] & sides[1] and len(sides[1]) >= len(sides[0]) // 25
    for record in splits[1].train[:50]:
        assert encoding.decode(record.prompt).endswith("\n\nAssistant:")
        assert all(response[-1] == 50256 and 50256 not in response[:-1] for response in record.responses)
