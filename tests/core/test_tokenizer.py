"""Tests of tokenizer.py: text to ids and back, a tokenizer's identity, and the sentences that refuse one."""

import base64
import itertools
import json
import random

import pytest
import requests
import tiktoken

from data import load_demonstrations
from files import gpt2, write
from hostile import encode_by_file, hostile_texts
from paths import DATA
from tokenizer import (DataError, encode_prompt, encode_response, get_tokenizer, oniguruma, run_tokenizer, tokenizer_id,
                       tokenizer_json)

BYTES = get_tokenizer("bytes")
EOS = 256


def ranks_file(path, merges=(b"he", b"ll", b"hell", b"hello"), skip=()):
    tokens = [bytes([byte]) for byte in range(256) if byte not in skip] + list(merges)
    return write(path, *(base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(tokens)))


TEXTS = ["", " ", "Where is Zürich?", "\n\nHuman: x\n\nAssistant:", "日本語 🙂", "a\x00b", "<|endoftext|>",
         "tabs\tand  spaces  \n", "\u2028\ufeff"]


@pytest.mark.parametrize("name", ["bytes", "atlas"])
@pytest.mark.parametrize("text", TEXTS)
def test_offline_tokenizers_encode_any_text(name, text):
    encoding = get_tokenizer(name)
    ids = encoding.encode_ordinary(text)
    assert encoding.decode(ids) == text
    assert encoding.eot_token == encoding.n_vocab - 1 and encoding.eot_token not in ids


def test_bytes_tokenizer_is_bytes():
    assert BYTES.encode_ordinary("aé") == [97, 0xC3, 0xA9]
    assert (BYTES.n_vocab, BYTES.eot_token) == (257, EOS)


def test_endoftext_in_a_text_is_text(tmp_path):
    """A control token in the data would end an episode, or be scored, wherever a user typed it."""
    path = write(tmp_path / "d.jsonl", {"prompt": "<|endoftext|>", "response": "a<|endoftext|>b"})
    record = load_demonstrations(path, BYTES, 64).train[0]
    assert EOS not in record.prompt
    assert record.response.count(EOS) == 1 and record.response[-1] == EOS
    assert BYTES.decode(record.response[:-1]) == "a<|endoftext|>b"


def test_empty_texts():
    assert encode_prompt(BYTES, "") == [EOS] and encode_response(BYTES, "") == [EOS]
    assert encode_prompt(BYTES, " ") == [32] and encode_response(BYTES, " \n") == [32, 10, EOS]


def test_unknown_tokenizer_lists_what_there_is():
    with pytest.raises(DataError, match=r"'gpt-2' \(did you mean gpt2\?\): give atlas, bytes, .*gpt2, "):
        get_tokenizer("gpt-2")
    with pytest.raises(DataError, match=r"unknown tokenizer 'qqqq': give"):
        get_tokenizer("qqqq")


@pytest.mark.parametrize("error", [requests.ConnectionError("no route"), PermissionError(13, "denied"),
                                   ValueError("Hash mismatch")])
def test_tokenizer_that_cannot_be_fetched(monkeypatch, error):
    def no_network(name):
        raise error
    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    with pytest.raises(DataError, match="tokenizer gpt2 could not be fetched.*TIKTOKEN_CACHE_DIR") as caught:
        get_tokenizer("gpt2")
    assert "\n" not in str(caught.value)


def test_encoding_without_endoftext_is_refused(monkeypatch):
    bare = tiktoken.Encoding("bare", pat_str=".", mergeable_ranks={b"a": 0}, special_tokens={})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: bare)
    with pytest.raises(DataError, match=r"has no <\|endoftext\|>"):
        get_tokenizer("gpt2")


def test_ranks_file(tmp_path):
    path = ranks_file(tmp_path / "tiny.tiktoken")
    encoding = get_tokenizer(path)
    assert get_tokenizer(str(path)).n_vocab == encoding.n_vocab == 256 + 4 + 1
    assert encoding.eot_token == 260 and encoding.name == "tiny"
    assert encoding.encode_ordinary("hello hell") == [259, 32, 258]
    for text in TEXTS:
        assert encoding.decode(encoding.encode_ordinary(text)) == text


@pytest.mark.parametrize("line, reason", [
    (b"aGVs", ":261: expected"), (b"aGVs 260 7", ":261: expected"), (b"aGV!s 260", ":261: expected"),
    (b"aGVs x", ":261: expected"), (b"\xff\xfe 260", ":261: expected"), (b"==== 260", ":261: expected"),
    (b"aGVs " + b"9" * 5000, ":261: expected"),
    (b"aGVsbG8= 260", "261: an earlier line has"),  # hello, once more
    (b"aGVs 259", "must have the ranks 0 to 260"), (b"aGVs 261", "must have the ranks"),
    (b"aGVs -1", "must have the ranks"), (b"aGVs 99999999999", "must have the ranks"),
])
def test_malformed_ranks_file(tmp_path, line, reason):
    path = ranks_file(tmp_path / "bad.tiktoken")
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(DataError) as caught:
        get_tokenizer(path)
    assert str(caught.value).startswith(f"{path}:") and reason in str(caught.value)


def test_ranks_file_must_cover_every_byte(tmp_path):
    with pytest.raises(DataError, match="byte 200 has no token"):
        get_tokenizer(ranks_file(tmp_path / "holes.tiktoken", skip=[200]))
    with pytest.raises(DataError, match="missing.tiktoken: No such file"):
        get_tokenizer(tmp_path / "missing.tiktoken")
    (tmp_path / "empty.tiktoken").write_bytes(b"")
    with pytest.raises(DataError, match="byte 0 has no token"):
        get_tokenizer(tmp_path / "empty.tiktoken")


def test_tokenizer_id(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    a, b = (tokenizer_id(get_tokenizer(ranks_file(tmp_path / name)))
            for name in ("tiny.tiktoken", "elsewhere/renamed.tiktoken"))
    assert [a[key] == b[key] for key in ("n_vocab", "eos", "sha256")] == [True] * 3
    assert (a["name"], b["name"]) == (a["source"], b["source"]) == ("tiny", "renamed")
    assert json.loads(json.dumps(a)) == a
    # The last two have the same bytes, cut elsewhere: only the length before each token tells them apart.
    merges = [(b"ll", b"he", b"hell", b"hello"), (b"hel", b"lhell", b"hello"), (b"he", b"llhell", b"hello")]
    others = [tokenizer_id(get_tokenizer(ranks_file(tmp_path / "other.tiktoken", each))) for each in merges]
    ids = [a, *others, tokenizer_id(BYTES), tokenizer_id(get_tokenizer("atlas"))]
    assert len({entry["sha256"] for entry in ids}) == len(ids)


def test_tokenizer_id_of_an_encoding_with_holes():
    def encoding(eos):
        return tiktoken.Encoding("h", pat_str=".", mergeable_ranks={b"a": 0, b"b": 5},
                                 special_tokens={"<|endoftext|>": eos})
    assert tokenizer_id(encoding(7))["n_vocab"] == 8
    assert tokenizer_id(encoding(7))["sha256"] != tokenizer_id(encoding(3))["sha256"]


def test_run_tokenizer_is_the_flag_or_the_checkpoints_or_the_datas(tmp_path):
    path = str(ranks_file(tmp_path / "tiny.tiktoken"))
    encoding, saved = run_tokenizer(path, "atlas")
    assert encoding.name == "tiny" and saved == tokenizer_id(encoding, path) and saved["source"] == path
    assert run_tokenizer(None, "atlas", saved)[1] == run_tokenizer(path, "atlas", saved)[1] == saved
    assert run_tokenizer(None, "atlas")[0].name == "atlas"
    with pytest.raises(DataError, match=r"bytes \(257 ids\) is not the one of the checkpoint \(tiny, 261"):
        run_tokenizer("bytes", "atlas", saved)
    ranks_file(tmp_path / "tiny.tiktoken", (b"ll", b"he", b"hell", b"hello"))  # changed under the same name
    with pytest.raises(DataError, match="is not the one of the checkpoint"):
        run_tokenizer(None, "atlas", saved)


def test_run_tokenizer_for_files_is_gpt2(monkeypatch):
    gpt2(monkeypatch)
    assert run_tokenizer(None, "pairs.jsonl")[0].name == "gpt2"


def test_gpt2_ids_are_gpt2s(monkeypatch, tmp_path):
    encoding = gpt2(monkeypatch)
    assert encoding.encode_ordinary("Hello world") == [15496, 995] and encoding.eot_token == 50256
    from_file = get_tokenizer(write(tmp_path / "copy.tiktoken", *(
        base64.b64encode(encoding.decode_single_token_bytes(rank)) + b" %d" % rank for rank in range(50256))))
    assert tokenizer_id(from_file) == tokenizer_id(encoding) | {"name": "copy", "source": "copy"}
    for text in TEXTS + ["I'll go,  they've said 123 things\n\n  twice "]:
        assert from_file.encode_ordinary(text) == encoding.encode_ordinary(text)


def test_tokenizer_json_of_a_ranks_file(tmp_path):
    contents = tokenizer_json(get_tokenizer(ranks_file(tmp_path / "tiny.tiktoken")))
    model = contents["model"]
    assert model["merges"] == [["h", "e"], ["l", "l"], ["he", "ll"], ["hell", "o"]]
    assert len(model["vocab"]) == 261 and sorted(model["vocab"].values()) == list(range(261))
    assert [model["vocab"][text] for text in ("a", "Ġ", "Ċ", "ł", "ÿ", "hello", "<|endoftext|>")] == [
        97, 32, 10, 0xa0, 255, 259, 260]  # GPT-2's names for a space, a line's end and the bytes A0 and FF
    assert [(token["id"], token["content"], token["special"]) for token in contents["added_tokens"]] == [
        (260, "<|endoftext|>", True)]
    assert json.loads(json.dumps(contents)) == contents


@pytest.mark.parametrize("name", ["atlas", "bytes", "file"])
def test_tokenizer_json_prescribes_the_ids_of_the_encoding(tmp_path, name):
    encoding = get_tokenizer(ranks_file(tmp_path / "tiny.tiktoken") if name == "file" else name)
    contents, texts = tokenizer_json(encoding), hostile_texts(encoding)
    assert len(texts) == 2400 > len(set(texts)) > 2000
    different = [text for text in texts if encode_by_file(contents, text) != encoding.encode_ordinary(text)]
    assert not different


def test_tokenizer_json_has_gpt2s_own_merges(monkeypatch):
    """The list that OpenAI published is recovered from the ranks, pair by pair."""
    contents = tokenizer_json(gpt2(monkeypatch))
    lines = [path.read_text(encoding="utf-8").splitlines() for path in (DATA / "tiktoken_cache").iterdir()]
    published, = [rows[1:] for rows in lines if rows[0].startswith("#version")]
    assert [" ".join(pair) for pair in contents["model"]["merges"]] == published and len(published) == 50_000


def test_one_pair_for_each_token_is_enough_in_any_vocabulary():
    """Also in those that no BPE would learn, where a token's parts may come after it."""
    rng = random.Random(0)
    words = ["".join(letters).encode() for n in range(2, 6) for letters in itertools.product("ab", repeat=n)]
    texts = ["".join(letters) for n in range(1, 8) for letters in itertools.product("ab", repeat=n)]
    for _ in range(20):
        tokens = [b"a", b"b", *rng.sample(words, rng.randint(1, 12))]
        rng.shuffle(tokens)
        encoding = tiktoken.Encoding("ab", pat_str=r"[\s\S]+", special_tokens={"<|endoftext|>": len(tokens)},
                                     mergeable_ranks={token: rank for rank, token in enumerate(tokens)})
        contents = tokenizer_json(encoding)
        assert all(encode_by_file(contents, text) == encoding.encode_ordinary(text) for text in texts), tokens


def test_tokenizer_json_refuses_a_special_token_that_is_ordinary_too(tmp_path):
    encoding = get_tokenizer(ranks_file(tmp_path / "twice.tiktoken", [b"<|endoftext|>"]))
    with pytest.raises(DataError, match=r"twice has <\|endoftext\|> twice"):
        tokenizer_json(encoding)


def test_a_split_pattern_in_the_dialect_of_tokenizers():
    assert oniguruma("(?s:.)") == r"[\s\S]"
    assert oniguruma(r"\p{L}++|\p{N}{1,3}+| ?x{2,}+") == r"\p{L}++|\p{N}{1,3}| ?x{2,}"
