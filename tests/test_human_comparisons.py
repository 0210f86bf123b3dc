"""Tests of experiments/human_comparisons.py: folds by prompt, intervals against known values, and a tiny run."""

import json
import math
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

import train_sft
from experiments import human_comparisons, sentiment
from tools.bpe import learn_bpe, write_ranks


@pytest.mark.parametrize("seed", range(5))
def test_no_prompt_is_in_two_folds_and_folds_are_of_a_size(seed):
    keys = [f"prompt {i % 37}" for i in range(100)]
    folds = human_comparisons.fold_of(keys, 5, seed)
    assert all(len({fold for key, fold in zip(keys, folds) if key == prompt}) == 1 for prompt in keys)
    sizes = [len({key for key, fold in zip(keys, folds) if fold == n}) for n in range(5)]
    assert set(sizes) == {7, 8}
    assert (folds == human_comparisons.fold_of(keys, 5, seed)).all()
    assert (folds != human_comparisons.fold_of(keys, 5, seed + 1)).any()


def test_the_interval_of_independent_pairs_is_the_binomial_one():
    mean, low, high = human_comparisons.interval([1] * 60 + [0] * 40, range(100))
    half = 1.96 * math.sqrt(0.6 * 0.4 / 100)
    assert (mean, low, high) == pytest.approx((0.6, 0.6 - half, 0.6 + half))


def test_the_interval_of_copies_is_that_of_the_originals():
    values, groups = [1, 0, 1, 1, 0, 1], range(6)
    once = human_comparisons.interval(values, groups)
    thrice = human_comparisons.interval(np.repeat(values, 3), np.repeat(groups, 3))
    assert thrice == pytest.approx(once)
    naive = human_comparisons.interval(np.repeat(values, 3), range(18))
    assert naive[2] - naive[1] < thrice[2] - thrice[1]  # copies taken for news would make it narrower


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng, covered = np.random.default_rng(0), 0
    for _ in range(400):
        group = np.repeat(np.arange(80), 3)
        p = rng.beta(2, 1, 80)[group]  # mean 2/3, shared within a group
        _, low, high = human_comparisons.interval(rng.random(240) < p, group)
        covered += low < 2 / 3 < high
    assert 0.92 < covered / 400 < 0.98


def test_the_interval_knows_how_far_the_seeds_are_apart():
    values, groups = np.array([1, 0, 1, 1, 0, 1, 1, 1]), range(8)
    mean, low, high = human_comparisons.interval([values] * 4, groups)
    assert (mean, low, high) == pytest.approx(human_comparisons.interval(values, groups))  # four times the same seed
    apart = np.array([[0.0] * 8, [0.2] * 8, [0.4] * 8, [0.6] * 8])  # no pair differs from another, but seeds do
    mean, low, high = human_comparisons.interval(apart, groups)
    assert (mean, high - mean) == pytest.approx((0.3, 1.96 * np.std([0, 0.2, 0.4, 0.6], ddof=1) / 2))
    both = human_comparisons.interval(values + apart, groups)
    assert both[2] - both[0] == pytest.approx(math.hypot(*(x[2] - x[0] for x in (
        human_comparisons.interval(values, groups), (mean, low, high)))))


def test_a_tie_is_half_right():
    assert human_comparisons.right([2, -1, 0]).tolist() == [1, 0, 0.5]


def write_pairs(path, n, rng):
    """Pairs whose chosen answer has the word "yes"; every prompt stands in two rows."""
    rows = []
    for i in range(n):
        answers = [" ".join(rng.choice("a bit of some more words".split(), 6)) for _ in range(2)]
        rows.append({"prompt": f"\n\nHuman: question {i // 2}\n\nAssistant:", "chosen": f" yes {answers[0]}",
                     "rejected": f" well {answers[1]}"})
    sentiment.write_rows(path, rows)


def test_a_bag_of_words_learns_the_word_that_decides(tmp_path):
    write_pairs(tmp_path / "pairs.jsonl", 40, np.random.default_rng(0))
    rows = human_comparisons.read_pairs(tmp_path / "pairs.jsonl")
    folds = human_comparisons.fold_of([row.prompt for row in rows], 4, 0)
    assert (human_comparisons.bag_of_words_margins(rows, folds) > 0).all()


def test_a_tiny_run_judges_every_pair_by_a_model_new_to_its_prompt(tmp_path, monkeypatch, capsys):
    if find_spec("matplotlib") is None:  # drawing is for those who have it
        monkeypatch.setattr(human_comparisons, "import_pyplot", lambda: None)
        monkeypatch.setattr(human_comparisons, "draw", lambda results, save: None)
    monkeypatch.setattr(human_comparisons, "run_jobs", run_here)
    rng, reviews = np.random.default_rng(0), tmp_path / "reviews"
    for name in ("hh", "llmbar", "hhh"):
        write_pairs(tmp_path / f"{name}.jsonl", 16, rng)
    reviews.mkdir()
    sentiment.write_rows(reviews / "sft.jsonl", [{"prompt": ">", "response": f" yes well, {i}"} for i in range(20)])
    write_ranks(reviews / "tokenizer.tiktoken", learn_bpe(["yes well some words question"], 270))
    train_sft.train(train_sft.Config(data=str(reviews / "sft.jsonl"), tokenizer=str(reviews / "tokenizer.tiktoken"),
                                     out_dir=str(reviews), device="cpu", max_iters=2, batch_size=4, n_layer=1, n_head=2,
                                     n_embd=16, block_size=160))
    config = human_comparisons.Config(*(str(tmp_path / f"{name}.jsonl") for name in ("hh", "llmbar", "hhh")), folds=2,
                                      seeds=1, sentiment=str(reviews), out_dir=str(tmp_path / "out"), workers=1,
                                      save=str(tmp_path / "out" / "h"))
    human_comparisons.main(config)
    results = json.loads((tmp_path / "out" / "h.json").read_text())["results"]
    for (name, result), file in zip(results.items(), ("hh", "llmbar", "hhh")):
        judges = result["judges"]
        assert result["rows"] == 16 and result["prompts"] == 8
        rows = human_comparisons.read_pairs(tmp_path / f"{file}.jsonl")
        folder = tmp_path / "out" / name
        for start in human_comparisons.STARTS:
            assert 0 <= judges[f"reward model, {start}"]["accuracy"][0] <= 1
            judged = []
            for fold in range(2):
                here = folder / f"{start}0{fold}"
                trained = {json.loads(line)["prompt"] for line in (here / "train.jsonl").read_text().splitlines()}
                mine = [int(i) for i in json.loads((here / "margins.json").read_text())]
                assert not trained & {rows[i].prompt for i in mine}
                judged += mine
            assert sorted(judged) == list(range(16))
        assert judges["longer is better"]["over_longer"] == [0, 0, 0] == judges["shorter is better"]["over_shorter"]
    # The scratch trunk is random, the other one trained.
    scratch, trained = (human_comparisons.load_checkpoint(path / "sft.pt", "sft")["model"]
                        for path in (tmp_path / "out" / "scratch", reviews))
    assert scratch["trunk.wte.weight"].std() == pytest.approx(0.02, rel=0.1)
    assert not torch.equal(scratch["trunk.wte.weight"], trained["trunk.wte.weight"])
    assert "| HH harmless, 16 pairs, 8 prompts | reward model, scratch |" in capsys.readouterr().out


def run_here(jobs, workers):
    for function, folder, _ in jobs:
        Path(folder).mkdir(parents=True, exist_ok=True)
        function(folder)
