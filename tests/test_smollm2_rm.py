"""Tests of experiments/smollm2_rm.py, on tiny random models: texts, features, judges, and a run from end to end."""

import json
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from experiments import smollm2_rm
from experiments.human_comparisons import fold_of, read_pairs
from model import GPT, GPTConfig
from paths import ROOT
from pretrained import LLAMA, from_pretrained, save_pretrained
from reward_model import RewardModel
from test_human_comparisons import run_here, write_pairs
from tokenizer import DataError, decode, get_tokenizer


@pytest.fixture
def folder(tmp_path):
    """A folder with a random Llama of two layers that reads bytes."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=257, block_size=256, n_layer=2, n_head=2, n_embd=16, **LLAMA.kind))
    save_pretrained(model, get_tokenizer("bytes"), tmp_path / "model")
    return tmp_path


def test_a_transcript_becomes_messages():
    prompt = "\n\nHuman: Hi: you\n\nme?\n\nAssistant: Hello.\n\nHuman: Assistant: is a word\n\nAssistant:"
    assert smollm2_rm.messages_of(prompt) == [
        {"role": "user", "content": "Hi: you\n\nme?"}, {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Assistant: is a word"}]


@pytest.mark.parametrize("prompt", ["a question", "\n\nHuman: a question", "hello\n\nHuman: a\n\nAssistant:",
                                    "\n\nHuman: a\n\nAssistant: begun"])
def test_what_is_no_transcript_is_refused(prompt):
    with pytest.raises(DataError, match="give HH transcripts"):
        smollm2_rm.messages_of(prompt)


def test_a_text_is_cut_at_the_outer_ends_and_ends_with_eos(tmp_path):
    encoding = get_tokenizer("bytes")
    (tmp_path / "pairs.jsonl").write_text(json.dumps(
        {"prompt": f"\n\nHuman: {'p' * 200}?\n\nAssistant:", "chosen": " no", "rejected": " " + "a" * 127 + "bc"}))
    chosen, rejected = smollm2_rm.ids_of(read_pairs(tmp_path / "pairs.jsonl")[0], encoding, "plain")
    assert chosen[:96] == rejected[:96] and decode(encoding, chosen[:96]).endswith("p?\n\nAssistant:\n")
    assert decode(encoding, chosen[96:]) == "no" and decode(encoding, rejected[96:]) == "a" * 127 + "b"
    assert chosen[-1] == rejected[-1] == encoding.eot_token


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "qwen3"])
def test_upper_layers_on_the_lower_ones_are_the_reward_model(family):
    policy = from_pretrained(ROOT / "tests" / "tiny_models" / family)
    model, kept = RewardModel.from_policy(policy), []
    layers = smollm2_rm.UpperLayers(policy.trunk, 1)
    layers.head.load_state_dict(model.head.state_dict())
    policy.trunk.blocks[0].register_forward_hook(lambda block, inputs, output: kept.append(output))
    tokens, lens = torch.randint(37, (4, 20)), torch.tensor([20, 12, 7, 15])
    with torch.no_grad():
        scores, _ = model(tokens, lens), policy(tokens)
        hidden = [states[:length] for states, length in zip(kept.pop(), lens)]
        margins = layers.margins([hidden[:2], hidden[2:]])
    torch.testing.assert_close(margins, scores[::2] - scores[1::2], rtol=1e-4, atol=1e-5)


def test_the_head_finds_the_direction_that_decides_and_not_in_noise(monkeypatch):
    monkeypatch.setattr(smollm2_rm, "L2", (1e-3, 1.0))
    keys = [f"prompt {i // 2}" for i in range(200)]
    features = torch.randn(200, 2, 30, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 30)
    noise = smollm2_rm.head_margins(features, keys, 2, 0)
    assert 0.35 < (noise > 0).mean() < 0.65 and np.abs(noise).mean() < 0.5
    features[:, 0, 3] += 4 * features[:, :, 3].std()
    margins = smollm2_rm.head_margins(features, keys, 2, 0)
    assert (margins > 0).mean() > 0.95


def test_no_judged_pair_moves_the_head_that_judges_it(monkeypatch):
    monkeypatch.setattr(smollm2_rm, "L2", (1e-3, 1.0))
    keys = [f"prompt {i // 2}" for i in range(40)]
    last, folds = torch.randn(40, 2, 5, generator=torch.Generator().manual_seed(0)), fold_of(keys, 4, 0)
    before = [smollm2_rm.head_of(last, keys, folds, fold, 0) for fold in range(4)]
    last[folds == 2] *= -3
    after = [smollm2_rm.head_of(last, keys, folds, fold, 0) for fold in range(4)]
    assert [torch.equal(a, b) for a, b in zip(before, after)] == [False, False, True, False]


def test_a_tiny_run_resumes_trains_and_judges_every_pair(folder, monkeypatch, capsys):
    if find_spec("matplotlib") is None:  # drawing is for those who have it
        monkeypatch.setattr(smollm2_rm, "import_pyplot", lambda: None)
        monkeypatch.setattr(smollm2_rm, "draw", lambda results, save: None)
    monkeypatch.setattr(smollm2_rm, "run_jobs", run_here)
    monkeypatch.setattr(smollm2_rm, "CHUNK", 10)
    monkeypatch.setattr(smollm2_rm, "L2", (0.1,))
    rng = np.random.default_rng(0)
    for name in ("hh", "llmbar", "hhh"):
        write_pairs(folder / f"{name}.jsonl", 36, rng)
    config = smollm2_rm.Config(str(folder / "model"), *(str(folder / f"{name}.jsonl") for name in (
        "hh", "llmbar", "hhh")), out_dir=str(folder / "out"), seeds=2, folds=2, lower=1, max_epochs=4.0, lr=3e-3,
        workers=1, save=str(folder / "out" / "s"))
    smollm2_rm.main(config)
    assert capsys.readouterr().out.count("features ") == 12
    features, layers = folder / "out" / "HHH" / "features", folder / "out" / "HHH" / "layers00"
    whole, judged = smollm2_rm.read_features(features, "last"), (layers / "margins.json").read_bytes()
    for file in (features / "0003.pt", features / "0002.pt", layers / "margins.json"):
        file.unlink()
    results = smollm2_rm.main(config)  # what is missing is made again, and alike
    screen = capsys.readouterr().out
    assert screen.count("features ") == 2 and "rm 4/4" in screen
    assert torch.equal(smollm2_rm.read_features(features, "last"), whole)
    assert (layers / "margins.json").read_bytes() == judged
    assert not list((folder / "out" / "HH harmless").glob("layers*"))
    assert results.keys() == {"HH harmless", "LLMBar and MT-Bench", "HHH"}
    for name, result in results.items():
        judges = result["judges"]
        assert list(judges) == ["longer is better", "shorter is better", "bag of words", "linear head"] + [
            "upper layers"] * (name != "HH harmless")
        assert len(judges["linear head"]["seeds"]) == 2 and judges["linear head"]["accuracy"][0] > 0.8
    assert len(results["HHH"]["judges"]["upper layers"]["seeds"]) == 1
    assert results["HHH"]["judges"]["upper layers"]["accuracy"][0] > 0.8
    assert "minus bag of words" in screen and json.loads((folder / "out" / "s.json").read_text())["results"]
