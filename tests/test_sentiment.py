"""Tests of experiments/sentiment.py: who sees what, the measures by hand, and a tiny run from end to end."""

import json
import math
from collections import Counter
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import train_ppo
from experiments import sentiment
from paths import DATA
from rollout import generate
from support import device, flags, stages
from support.checkpoint import load_checkpoint

FILES = {name: DATA / f"{file}.jsonl.gz" for name, file in
         (("labelled", "imdb_train_20k"), ("test", "imdb_test_5k"), ("unsup", "imdb_unsup_25k"))}
GOOD, BAD = "great lovely superb".split(), "awful dull boring".split()
PLAIN = "film plot actor scene story music".split()


def review(rng, label=None):
    words = rng.choice(PLAIN + (GOOD if label == 1 else BAD if label == 0 else GOOD + BAD) * 2, 20)
    return {"text": " ".join(words)} | ({} if label is None else {"label": label})


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A Config on made-up reviews, in a folder of their own."""
    folder, rng = tmp_path_factory.mktemp("reviews"), np.random.default_rng(0)
    for name, n in (("labelled", 400), ("test", 700), ("unsup", 200)):
        sentiment.write_rows(folder / f"{name}.jsonl",
                             [review(rng, None if name == "unsup" else i // 2 % 2) for i in range(n)])
    return sentiment.Config(*(str(folder / f"{name}.jsonl") for name in ("labelled", "test", "unsup")), seeds=1,
                            out_dir=str(folder / "out"), vocab_size=280, text_tokens=12, n_layer=1, n_head=2, n_embd=16,
                            sft_iters=4, rm_iters=3, max_iters=2, every=1, workers=1, save=str(folder / "out" / "s"))


def check_disjoint(parts):
    texts = {who: {row["text"] for row in rows} for who, rows in parts.items()}
    names = sorted(texts)
    for i, a in enumerate(names):
        for b in names[i + 1:]:
            assert not texts[a] & texts[b], f"{a} and {b} share a text"
    openings = {who: {sentiment.opening(text) for text in texts[who]} for who in ("prompts", "test")}
    assert not openings["prompts"] & openings["test"]


def test_policy_reward_model_judge_and_measurement_share_no_text(config):
    check_disjoint(sentiment.split_texts(config))


@pytest.mark.skipif(not all(path.exists() for path in FILES.values()), reason="the IMDb files are not there")
@pytest.mark.slow
def test_no_real_review_is_seen_by_two_and_the_judge_beats_a_coin_on_it():
    config = sentiment.Config(**{name: str(path) for name, path in FILES.items()})
    parts = sentiment.split_texts(config)
    check_disjoint(parts)
    assert {who: len(rows) for who, rows in parts.items() if who != "prompts"} == {
        "sft": 25_000, "rm": 10_000, "judge": 10_000, "test": 512}
    judge = sentiment.Judge(*sentiment.columns(parts["judge"]))
    assert judge.accuracy(*sentiment.columns(parts["test"])) > 0.75


def test_a_cut_is_whole_words_and_tokenizes_as_the_whole_text_does(config):
    encoding, parts = sentiment.prepare_texts(config)
    for row in [*parts["test"][:50], {"text": "Unseen, odd:  “quotes”\n\nand naïve café words…"}]:
        whole = sentiment.one_line(row["text"])
        for n in (1, 5, 12, 1000):
            text = sentiment.cut(encoding, row["text"], n)
            ids = encoding.encode_ordinary(text)
            assert len(ids) <= n and whole.startswith(text) and whole[len(text):][:1] in ("", " ")
            assert encoding.encode_ordinary(sentiment.PROMPT + whole)[1:1 + len(ids)] == ids
            nxt = whole[len(text):].split(" ")[1:2]
            assert not nxt or len(encoding.encode_ordinary(f"{text} {nxt[0]}")) > n  # nor could one more word stay


def test_passages_are_the_text_in_whole_words_and_none_is_long_or_a_scrap(config):
    encoding, parts = sentiment.prepare_texts(config)
    for row in parts["rm"][:50]:
        runs, whole = sentiment.passages(encoding, row["text"], 12), sentiment.one_line(row["text"])
        lengths = [len(encoding.encode_ordinary(run)) for run in runs]
        assert runs[0] == sentiment.cut(encoding, row["text"], 12) and max(lengths) <= 12 and min(lengths[1:]) >= 6
        assert whole.startswith("".join(runs)) and len(encoding.encode_ordinary(whole[len("".join(runs)):])) < 6
    short, endless = "film", "film " + "x" * 100 + " plot"
    assert sentiment.passages(encoding, short, 12) == [" film"] == sentiment.passages(encoding, endless, 12)
    rows = [{"text": "film", "label": 1}, {"text": "plot", "label": 0}]
    assert sentiment.labelled_passages(encoding, rows, 12) == ([" film", " plot"], [1, 0])


def test_the_policy_and_the_reward_model_read_texts_of_one_form(config):
    encoding, parts = sentiment.prepare_texts(config)
    folder = Path(config.out_dir)
    sft, pairs, prompts = ([json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
                           for name in ("sft", "pairs", "prompts"))
    assert {row["prompt"] for row in [*sft, *pairs]} == {sentiment.PROMPT}
    passages = Counter(zip(*sentiment.labelled_passages(encoding, parts["rm"], config.text_tokens)))
    paired = Counter([(row["chosen"], 1) for row in pairs] + [(row["rejected"], 0) for row in pairs])
    assert len(pairs) == sentiment.PAIRINGS * min(sum(n for (_, label), n in passages.items() if label == side)
                                                  for side in (0, 1))
    assert all(n <= sentiment.PAIRINGS * passages[text, label] for (text, label), n in paired.items())
    assert all(len(row["prompt"].split()) == sentiment.OPENING + 1 for row in prompts)
    assert all(row["prompt"].startswith(sentiment.PROMPT + " ") for row in prompts)


def test_the_logistic_regression_is_at_the_minimum_of_its_loss():
    torch.manual_seed(0)
    x, y = (torch.rand(60, 5) < 0.5).float(), (torch.rand(60) < 0.5).float()
    w = sentiment.fit_linear(x.to_sparse(), y, l2=0.1)
    gradient = x.T @ (torch.sigmoid(x @ w) - y) / 60 + 0.1 * w
    assert gradient.abs().max() < 1e-5 and w.abs().max() > 0.05


def test_the_judge_tells_made_up_reviews_apart(config):
    parts = sentiment.split_texts(config)
    judge = sentiment.Judge(*sentiment.columns(parts["judge"]))
    assert judge.accuracy(*sentiment.columns(parts["test"])) > 0.95
    good, bad, neither = judge.probabilities(["great superb", "Awful! DULL", "words it never met"]).tolist()
    assert good > 0.6 and bad < 0.4 and bad < neither < good


@pytest.mark.parametrize("text, expected", [("a b c a b c", 1 / 4), ("a b c d", 0), ("x x x x x", 2 / 3), ("a b", 0)])
def test_repetition_by_hand(text, expected):
    assert sentiment.repetition(text) == pytest.approx(expected)


def test_distinct_n_by_hand():
    assert sentiment.distinct(["a b a", "a b"], 1) == pytest.approx(2 / 5)
    assert sentiment.distinct(["a b a", "a b"], 2) == pytest.approx(2 / 3)  # no pair runs from one text into the next
    assert sentiment.distinct(["a"], 2) == 0


def test_paired_accuracy_by_hand():
    scores, good = torch.tensor([3.0, 1.0, 2.0, 0.0]), torch.tensor([True, True, False, False])
    assert sentiment.paired_accuracy(scores, good) == pytest.approx(3 / 4)


def test_the_table_ends_with_the_last_policy(capsys):
    run = {name: [[0.0, 1.0, 2.0, 3.0]] for name in sentiment.MEASURES} | {"iter": [0, 10, 20, 30]}
    sentiment.print_table({"ppo": {x: run | {"samples": {"before": [], "after": []}} for x in ("0.0", "0.2")},
                           "real reviews": {}, "accuracy": {"reviews": 2}, "seconds": {}})
    shown = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert shown[1:6] == ["SFT, 0", "kl_coef 0.0, 20", "kl_coef 0.0, 30", "kl_coef 0.2, 20", "kl_coef 0.2, 30"]


def test_looks_that_would_leave_out_the_last_rollouts_are_refused(config):
    with pytest.raises(flags.UserError, match="--max_iters=5 is no multiple of --every=2"):
        sentiment.main(replace(config, max_iters=5, every=2))


def test_a_tiny_run_judges_every_policy_and_goes_on_where_it_stopped(config, monkeypatch, capsys):
    if find_spec("matplotlib") is None:  # drawing is for those who have it
        monkeypatch.setattr(sentiment, "import_pyplot", lambda: None)
        monkeypatch.setattr(sentiment, "draw", lambda results, save: None)
    monkeypatch.setattr(sentiment, "KL_COEFS", (0.0, 0.2))
    monkeypatch.setattr(sentiment, "run_jobs", run_here)
    sentiment.main(config)
    results = json.loads(Path(f"{config.save}.json").read_text())
    for run in results["ppo"].values():
        assert run["iter"] == [0, 1, 2] and all(math.isfinite(x) for name in sentiment.MEASURES for x in run[name][0])
        assert run["kl"][0][0] == 0  # the first policy is the SFT policy
    assert results["config"]["out_dir"] == "out" and results["config"]["test"] == "test.jsonl"  # no folder of a machine
    assert results["real reviews"]["positive"] == pytest.approx(0.5, abs=0.1)
    assert "| kl_coef 0.2, 2 |" in capsys.readouterr().out
    folder = Path(config.out_dir) / "seed0" / "kl_coef 0.0"
    before = (folder / "ppo.pt").stat().st_mtime_ns
    sentiment.main(config)
    assert (folder / "ppo.pt").stat().st_mtime_ns == before  # nothing ran again
    assert json.loads(Path(f"{config.save}.json").read_text())["ppo"] == results["ppo"]

    # The run in two parts is the run in one: the same weights, to the last bit.
    flags = load_checkpoint(folder / "ppo.pt", "ppo")["flags"]
    train_ppo.train(train_ppo.Config(**flags | {"out_dir": str(folder / "whole"), "resume": False, "init_from":
                                                str(Path(config.out_dir) / "sft.pt")}))
    whole, parts = (load_checkpoint(path / "ppo.pt", "ppo")["model"] for path in (folder / "whole", folder))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)

    # The measures of a rollout, against what they mean.
    measure = sentiment.Measure(config, folder.parent / "rm.pt")
    encoding, eos = measure.encoding, measure.encoding.eot_token
    prompts, lens = data.collate_prompts([data.encode_prompt(encoding, sentiment.PROMPT + " film plot")] * 8, eos)
    rollout = generate(measure.reference, prompts, lens, 6, eos=eos, generator=device.generator("cpu", 0))
    numbers = measure.numbers(measure.reference, rollout)
    assert numbers["kl"] == 0 and numbers["length"] == pytest.approx(rollout.mask.sum().item() / 8, abs=1e-3)
    assert numbers["perplexity"] == pytest.approx((-rollout.logprobs.sum() / rollout.mask.sum()).exp().item(), rel=1e-3)
    other = stages.load_policy(load_checkpoint(folder / "ppo.pt", "ppo"), "cpu")
    with torch.no_grad():
        other.trunk.wte.weight *= 20
    rollout = generate(other, prompts, lens, 6, eos=eos, generator=device.generator("cpu", 0))
    numbers = measure.numbers(other, rollout)
    own, n = rollout.logprobs.sum().item() / 8, rollout.mask.sum().item() / 8
    assert numbers["kl"] > 1 and numbers["kl"] == pytest.approx(own + n * math.log(numbers["perplexity"]), rel=1e-3)


def run_here(jobs, workers):
    for function, folder, _ in jobs:
        folder.mkdir(parents=True, exist_ok=True)
        function(folder)
