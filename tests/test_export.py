"""Tests of tools/export.py: transformers gives the logits, the ids and the end of a response that we give."""

import importlib
import json

import pytest
import tiktoken
import torch

import sample
from files import gpt2
from hostile import hostile_texts
from model import GPT, GPTConfig
from paths import ROOT
from pretrained import from_pretrained, save_pretrained
from support.flags import UserError
from tensors import gap, random_ids
from tiny import command, run, weights
from tokenizer import decode, encode_prompt, get_tokenizer
from tools import export
from tools.bpe import learn_bpe, write_ranks

QUESTIONS = ["Where is Lima?", "In which country is Bangkok?", "Tell me where Johannesburg is.", "Where is Bergen?",
             "Is <|endoftext|> in Peru?", "x"]


def exported(checkpoint, folder):
    export.main(export.Config(checkpoint=str(checkpoint), to=str(folder)))
    return folder


@pytest.fixture
def both(sft, tmp_path):
    """A policy and its encoding, and what transformers makes of them: (GPT, encoding, model, tokenizer)."""
    transformers = pytest.importorskip("transformers")
    folder = exported(sft, tmp_path / "hf")
    return (*sample.load(sft, "cpu")[:2], transformers.AutoModelForCausalLM.from_pretrained(folder),
            transformers.AutoTokenizer.from_pretrained(folder))


def greedy(model, encoding, prompt, limit):
    """The likeliest tokens after a prompt of ids, up to EOS or the limit."""
    ids = list(prompt)
    while len(ids) < len(prompt) + limit:
        ids.append(model.policy_head(model(torch.tensor([ids])))[0, -1].argmax().item())
        if ids[-1] == encoding.eot_token:
            break
    return ids


# ---------------------------------------------------------------------------------------------------------------------
# the model

def test_transformers_gives_the_same_logits(both):
    policy, _, hf, _ = both
    idx = random_ids(policy.config.vocab_size, 3, policy.config.block_size)
    with torch.no_grad():
        expected, logits = policy.policy_head(policy(idx)), hf(idx).logits
    assert expected.std() > 1 and gap(logits, expected) < 1e-5


@torch.no_grad()
def test_transformers_continues_greedily_as_we_do_and_stops_at_eos(both):
    policy, encoding, hf, tokenizer = both
    has_eos = 0
    for question in QUESTIONS:
        ours = greedy(policy, encoding, encode_prompt(encoding, question), 24)
        theirs = hf.generate(**tokenizer(question, return_tensors="pt"), do_sample=False, max_new_tokens=24)[0].tolist()
        assert theirs == ours
        has_eos += ours[-1] == encoding.eot_token
        assert tokenizer.decode(theirs, skip_special_tokens=True) == decode(encoding, ours)
    assert has_eos >= 3


@torch.no_grad()
def test_a_batch_of_prompts_of_several_lengths_continues_as_each_does(both):
    policy, encoding, hf, tokenizer = both
    batch = tokenizer(QUESTIONS, return_tensors="pt", padding=True)
    out = hf.generate(**batch, do_sample=False, max_new_tokens=24)[:, batch["input_ids"].size(1):].tolist()
    for question, answer in zip(QUESTIONS, out):
        prompt = encode_prompt(encoding, question)
        ours = greedy(policy, encoding, prompt, 24)[len(prompt):]
        assert answer[:len(ours)] == ours and set(answer[len(ours):]) <= {encoding.eot_token}


@torch.no_grad()
def test_transformers_samples_from_the_whole_distribution_by_default(both):
    """With no arguments it samples from the very logits, until EOS or the end of the context."""
    policy, encoding, hf, tokenizer = both
    torch.manual_seed(0)
    batch = tokenizer(["Where is Lima?"] * 8, return_tensors="pt")
    out = hf.generate(**batch, output_scores=True, output_logits=True, return_dict_in_generate=True)
    assert all(torch.equal(scores, logits) for scores, logits in zip(out.scores, out.logits))
    assert len({tuple(row) for row in out.sequences.tolist()}) > 1
    hf.generation_config.eos_token_id = None
    assert hf.generate(**batch).size(1) == policy.config.block_size


@torch.no_grad()
def test_an_empty_prompt_is_eos_if_generate_gets_no_ids(both):
    policy, encoding, hf, _ = both
    ours = greedy(policy, encoding, encode_prompt(encoding, ""), 24)
    assert hf.generate(do_sample=False, max_new_tokens=24)[0].tolist() == ours and ours[0] == encoding.eot_token


# ---------------------------------------------------------------------------------------------------------------------
# the tokenizer

def learnt(folder):
    text = (ROOT / "docs/derivation.md").read_text() + (ROOT / "atlas.py").read_text()
    write_ranks(folder / "learnt.tiktoken", learn_bpe(text.splitlines(), 900))
    return get_tokenizer(folder / "learnt.tiktoken")


def openais(name):
    """A name's split pattern and special tokens on a vocabulary learnt here; the ids between them have no token."""
    def make(folder, monkeypatch):
        small = learnt(folder)
        ranks = {token: small.encode_single_token(token) for token in small.token_byte_values()}
        public = importlib.import_module("tiktoken_ext.openai_public")
        monkeypatch.setattr(public, "load_tiktoken_bpe", lambda *args, **kwargs: ranks)
        return tiktoken.Encoding(**getattr(public, name)())
    return make


ENCODINGS = {"atlas": lambda *_: get_tokenizer("atlas"), "bytes": lambda *_: get_tokenizer("bytes"),
             "learnt": lambda folder, _: learnt(folder), "gpt2": lambda _, monkeypatch: gpt2(monkeypatch),
             "cl100k": openais("cl100k_base"), "o200k": openais("o200k_base")}


@pytest.mark.parametrize("name", ENCODINGS)
def test_auto_tokenizer_gives_the_same_ids_and_the_same_text(tmp_path, monkeypatch, name):
    transformers = pytest.importorskip("transformers")
    encoding = ENCODINGS[name](tmp_path, monkeypatch)
    save_pretrained(GPT(GPTConfig(8, encoding.n_vocab, 1, 1, 8)), encoding, tmp_path / "hf")
    hf = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf", model_max_length=10**6)
    texts = hostile_texts(encoding)
    expected, found = encoding.encode_ordinary_batch(texts, num_threads=1), hf(texts)["input_ids"]
    assert len(texts) >= 2000 and [text for text, a, b in zip(texts, expected, found) if a != b] == []
    assert hf.batch_decode(found) == texts
    assert hf.eos_token_id == hf.bos_token_id == hf.pad_token_id == encoding.eot_token
    # whatever a policy may sample: tokens that end within a character, EOS, one after the other
    ids = [encoding.encode_single_token(token) for token in encoding.token_byte_values()] + [encoding.eot_token] * 9
    rows = [[ids[i] for i in random_ids(len(ids), 1, 12, seed)[0]] for seed in range(300)]
    assert [decode(encoding, row) for row in rows] == hf.batch_decode(rows, skip_special_tokens=True)


# ---------------------------------------------------------------------------------------------------------------------
# the tool

def test_the_folder_of_a_policy_holds_its_policy_and_not_its_critic(world, tmp_path):
    folder = world("ppo")
    run("ppo", folder, critic="separate")
    exported(folder / "ppo.pt", tmp_path / "hf")
    assert {path.name for path in (tmp_path / "hf").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    saved, back = weights(folder, "ppo")["model"], from_pretrained(tmp_path / "hf").state_dict()
    assert all(torch.equal(back[name], value) for name, value in saved.items() if not name.startswith("value_head"))
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["eos_token_id"] == config["bos_token_id"] == 256


def test_a_reward_model_is_refused(worlds, tmp_path):
    with pytest.raises(UserError, match="is a reward model, and transformers has no class .*: export an sft.pt or ppo"):
        exported(worlds["pairs"] / "rm.pt", tmp_path / "hf")
    assert not any(tmp_path.iterdir())


def test_a_missing_folder_or_a_taken_one_is_a_sentence(sft, tmp_path, capsys):
    def exit_code(*flags):
        return command("tools/export.py", f"--checkpoint={sft}", *flags)
    assert exit_code() == 2
    assert "--to names the folder to write: give one that does not exist" in capsys.readouterr().err
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    assert exit_code(f"--to={tmp_path / 'taken'}") == 2
    assert "taken exists and is not an empty folder: choose another path\n" in capsys.readouterr().err
    assert exit_code(f"--to={tmp_path / 'new'}") == 0
