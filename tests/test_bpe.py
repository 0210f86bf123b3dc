"""Tests of tools/bpe.py: the vocabulary it learns is one that tiktoken reads, and means the same to both."""

import json
import subprocess
import sys

import pytest
import regex

import data
import tokenizer
from paths import ROOT
from tools import bpe
from tools.bpe import learn_bpe, merge, write_ranks

TEXTS = ["the cat sat on the mat, the mat sat", " aaaa aaaaa aaa aaaaaaa abab ababab", "naïve café 東京 ☃ don't",
         "a tab\tand\n\nlines  and   blanks "] * 3


def encoding_of(ranks, tmp_path):
    write_ranks(tmp_path / "t.tiktoken", ranks)
    return data.get_tokenizer(tmp_path / "t.tiktoken")


def test_the_first_merge_is_the_commonest_pair_and_ranks_count_up():
    ranks = learn_bpe(["low low low lower newest"], 259)
    assert list(ranks.values()) == list(range(259))
    assert list(ranks)[256:] == [b"lo", b"low", b" low"]  # 4 times each, and in the order they arise


def test_any_text_comes_back_whole(tmp_path):
    encoding = encoding_of(learn_bpe(TEXTS, 300), tmp_path)
    for text in [*TEXTS, "unseen Ωmega 123!", "\x00\x7f"]:
        assert encoding.decode(encoding.encode_ordinary(text)) == text


def test_tiktoken_splits_every_word_as_the_learner_does(tmp_path):
    ranks = learn_bpe(TEXTS, 300)
    encoding = encoding_of(ranks, tmp_path)
    for word in regex.findall(tokenizer.GPT2_SPLIT, " ".join([*TEXTS, " aaaaaaaaaaaaa abababa themat"])):
        parts = merge([bytes([byte]) for byte in word.encode()], ranks)
        assert [ranks[part] for part in parts] == encoding.encode_ordinary(word)


def test_each_token_was_the_commonest_pair_when_it_was_made(tmp_path):
    words = [word.encode() for text in TEXTS for word in regex.findall(tokenizer.GPT2_SPLIT, text)]
    ranks = learn_bpe(TEXTS, 290)
    assert len(ranks) == 290
    for n in range(256, 290):
        before = {token: rank for token, rank in ranks.items() if rank < n}
        counts = {}
        for word in words:  # from nothing, where learn_bpe updates its counts
            parts = merge([bytes([byte]) for byte in word], before)
            for pair in map(bytes.__add__, parts, parts[1:]):
                counts[pair] = counts.get(pair, 0) + 1
        token = next(token for token, rank in ranks.items() if rank == n)
        assert counts[token] == max(counts.values())


def test_a_text_with_too_few_pairs_gives_a_smaller_vocabulary():
    assert list(learn_bpe(["ab"], 1000))[256:] == [b"ab"]


@pytest.mark.slow
def test_the_vocabulary_is_the_same_in_every_process():
    code = "from tools.bpe import learn_bpe; print(list(learn_bpe(['the cat sat on the mat that sat there'], 270)))"
    runs = {subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"},
                           capture_output=True, text=True, check=True).stdout for seed in ("1", "2")}
    assert len(runs) == 1


def test_the_command_writes_a_file_that_the_train_scripts_read(tmp_path, capsys):
    rows, save = tmp_path / "rows.jsonl", tmp_path / "x.tiktoken"
    rows.write_text("".join(json.dumps({"text": text, "label": 1}) + "\n" for text in TEXTS))
    bpe.main([str(rows), "--vocab_size=280", f"--save={save}"])
    assert "280 tokens from 12 rows" in capsys.readouterr().out and data.get_tokenizer(save).n_vocab == 281
    with pytest.raises(SystemExit) as stopped:
        bpe.main([str(tmp_path / "no.jsonl"), f"--save={save}"])
    assert stopped.value.code == 2 and "No such file" in capsys.readouterr().err
