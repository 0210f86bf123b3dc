"""Tests of experiments/smollm2_stages.py, on a tiny random Llama: the files, the judge, and a run from end to end."""

import json

import numpy as np
import pytest
import torch

from data import read_rows
from experiments import smollm2_stages
from experiments.sentiment import write_rows
from model import GPT, GPTConfig
from pretrained import LLAMA, save_pretrained
from test_human_comparisons import run_here
from tokenizer import get_tokenizer, render_messages


@pytest.fixture
def folder(tmp_path):
    """A folder with a random Llama that reads bytes, and a file of 200 pairs, some of which are too long."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=257, block_size=256, n_layer=1, n_head=2, n_embd=16, **LLAMA.kind))
    save_pretrained(model, get_tokenizer("bytes"), tmp_path / "model")
    rng = np.random.default_rng(0)
    rows = []
    for i in range(200):
        question, answers = f"question {i}", [" ".join(rng.choice("a bit of more".split(), 4)) for _ in range(2)]
        question += " and more words" * 4 * (i % 5 == 0)
        answers[0] += " words" * 10 * (i % 7 == 0)
        start = f"\n\nHuman: {question}\n\nAssistant:"
        rows.append({"chosen": f"{start} yes {answers[0]}", "rejected": f"{start} no {answers[1]}"})
    write_rows(tmp_path / "hh.jsonl", rows)
    return tmp_path


def test_no_two_of_the_files_share_a_prompt_and_none_has_a_long_text(folder, monkeypatch):
    monkeypatch.setattr(smollm2_stages, "PPO_PROMPT_TOKENS", 104)
    smollm2_stages.write_data(folder, str(folder / "model"), str(folder / "hh.jsonl"))
    files = {name: read_rows(folder / f"{name}.jsonl")[0] for name in ("proxy", "judge", "prompts")}
    prompts = {name: {json.dumps(row["prompt"]) for row in rows} for name, rows in files.items()}
    assert sum(map(len, prompts.values())) == len(set().union(*prompts.values())) == 200
    assert abs(len(prompts["proxy"]) - len(prompts["judge"])) <= 1 and len(prompts["proxy"]) > 50
    texts = [row[side] for name in ("proxy", "judge") for row in files[name] for side in ("chosen", "rejected")]
    assert max(map(len, texts)) < smollm2_stages.RESPONSE_TOKENS and texts[0].startswith("yes ")


def test_a_run_from_the_comparisons_to_the_figure(folder, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(smollm2_stages, "run_jobs", run_here)
    monkeypatch.setattr(smollm2_stages, "LAST", 2)
    config = smollm2_stages.Config(
        model=str(folder / "model"), hh=str(folder / "hh.jsonl"), out_dir=str(folder / "out"), sft_iters=2, rm_iters=2,
        max_iters=6, workers=1, save=str(folder / "figure"))
    results = smollm2_stages.main(config)
    screen = capsys.readouterr().out
    assert [screen.count(f"train_{stage}: wrote") for stage in ("sft", "rm", "ppo")] == [1, 2, 3]
    seed = folder / "out" / "seed0"
    assert not list(seed.glob("kl_coef*/ppo*.pt")) and (folder / "figure.png").stat().st_size > 5000
    assert set(results["runs"]) == set(smollm2_stages.RUNS) and 0 <= results["accuracy"][0]["judge"]["accuracy"] <= 1
    run = results["runs"]["kl_coef 0.05"][0]
    assert run["eval"][0] == [1, 5, 6] and len(run["score"][0]) == 6 and "judge at its best" in screen

    # what the judge says is the score of train_rm.py's model, on the rendered prompt and the answer with its EOS
    judge = smollm2_stages.Judge(seed / "judge" / "rm.pt")
    row = {"prompt": [{"role": "user", "content": "question"}]}
    ids = render_messages(judge.encoding, row["prompt"], judge.chat) + [*b"yes", judge.encoding.eot_token]
    with torch.no_grad():
        expected = judge.model(torch.tensor([ids]), torch.tensor([len(ids)]))
    torch.testing.assert_close(judge([""], ["yes"], [row]), expected)
    smollm2_stages.main(config)
    assert "train_" not in capsys.readouterr().out  # the second time there is nothing to train
