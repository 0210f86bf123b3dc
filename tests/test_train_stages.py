"""Tests of the three stages together: train_ppo.py runs the missing ones, the default job learns, real files work."""

import os
import re
import subprocess
import sys

import pytest

from model import GPT, GPTConfig
from paths import DATA, ROOT
from pretrained import save_pretrained
from support import checkpoint
from support.checkpoint import digest, load_checkpoint
from support.flags import UserError
from tiny import SIZES, STAGES, metrics, pairs, reward_file, run, shrink, weights, write_jsonl
from tokenizer import DataError, get_tokenizer


def test_ppo_trains_the_missing_stages_and_says_so(world, monkeypatch, capsys):
    shrink(monkeypatch)
    folder = world("sft")
    run("ppo", folder, seed=3, **SIZES)
    out = capsys.readouterr().out
    assert re.search(r"sft\.pt is not there: running train_sft\.py first", out)
    assert re.search(r"rm\.pt is not there: running train_rm\.py first", out)
    for stage in STAGES:
        saved = load_checkpoint(folder / f"{stage}.pt", stage)
        assert saved["finished"] and saved["flags"]["seed"] == 3 and saved["tokenizer"]["name"] == "bytes"
    assert all(metrics(folder, stage) for stage in STAGES)


@pytest.mark.parametrize("stage", ["sft", "rm"])
def test_ppo_first_resumes_an_earlier_stage_that_was_interrupted(stage, world, monkeypatch, capsys):
    """What it ends with is what an uninterrupted run of that stage ends with."""
    shrink(monkeypatch)
    whole, folder = world(stage), world(stage)
    run(stage, whole, save_interval=2)
    save = checkpoint.save_checkpoint

    def interrupted(*args):
        save(*args)
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, "save_checkpoint", interrupted)
        run(stage, folder, save_interval=2)
    capsys.readouterr()
    assert not load_checkpoint(folder / f"{stage}.pt", stage)["finished"]
    run("ppo", folder, **SIZES)
    out = capsys.readouterr().out
    assert f"{stage}.pt is unfinished: running train_{stage}.py first" in out
    assert f"{stage} 3/4" in out and f"{stage} 1/4" not in out
    assert digest(weights(folder, stage)) == digest(weights(whole, stage))
    assert metrics(folder, stage) == metrics(whole, stage)


def test_a_stage_of_other_data_or_another_seed_is_used_with_a_note(world, capsys):
    folder = world("ppo")
    run("ppo", folder, max_iters=1)
    assert "was trained" not in capsys.readouterr().out
    write_jsonl(folder / "other.jsonl", pairs(offset=100))
    run("ppo", folder, max_iters=1, overwrite=True, data=str(folder / "other.jsonl"), seed=7)
    out = capsys.readouterr().out
    notes = [line for line in out.splitlines() if "was trained on other data and with --seed=0" in line]
    assert len(notes) == 2 and "sft.pt" in notes[0] and "train_rm.py --overwrite replaces it" in notes[1]
    run("ppo", folder, max_iters=1, overwrite=True, seed=7, init_from=str(folder / "sft.pt"), rm=str(folder / "rm.pt"))
    assert "was trained" not in capsys.readouterr().out  # these were named


@pytest.mark.parametrize("stage, user, flag", [("sft", "rm", "init_from"), ("sft", "ppo", "init_from"),
                                               ("rm", "ppo", "rm")])
def test_an_unfinished_model_is_refused_where_it_is_named(stage, user, flag, world):
    """An interrupted reward model is not calibrated, so that kl_coef would not mean what it says."""
    folder = world(user)
    saved = load_checkpoint(folder / f"{stage}.pt", stage)
    saved.pop("sha256")
    checkpoint.save_checkpoint(folder / "part.pt", saved | {"finished": False})
    with pytest.raises(UserError, match=rf"part\.pt is unfinished, it stopped after iteration \d+: .* train_{stage}"):
        run(user, folder, **{flag: str(folder / "part.pt")})
    assert not (folder / f"{user}.pt").exists()


@pytest.mark.parametrize("missing, flag", [("sft", "init_from"), ("rm", "rm")])
def test_resume_trains_no_other_stage(missing, flag, world, monkeypatch):
    """A run with --init_from that is resumed without it would train for minutes before it compares anything."""
    shrink(monkeypatch)
    folder = world("ppo")
    (folder / f"{missing}.pt").rename(folder / "named.pt")
    run("ppo", folder, **{flag: str(folder / "named.pt")})
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(UserError, match=f"{missing}.pt, which is not there: give its --{flag}"):
        run("ppo", folder, resume=True, max_iters=6)
    assert sorted(path.name for path in folder.iterdir()) == before


def test_what_a_later_stage_would_refuse_comes_before_the_first_trains(world, monkeypatch):
    shrink(monkeypatch)
    folder = world("sft")
    write_jsonl(folder / "pairs.jsonl", [row | {"rejected": row["chosen"]} for row in pairs()])
    with pytest.raises(DataError, match="0 usable rows .*chosen equal to rejected"):
        run("ppo", folder, **SIZES)
    assert not (folder / "sft.pt").exists()


def test_ppo_starts_from_a_pretrained_folder_without_any_sft_stage(world, tmp_path, monkeypatch):
    shrink(monkeypatch)
    folder, reward = world("sft"), reward_file(tmp_path, "[float(len(r)) for r in responses]")
    save_pretrained(GPT(GPTConfig(vocab_size=257, **SIZES)), get_tokenizer("bytes"), tmp_path / "gpt2")
    write_jsonl(folder / "prompts.jsonl", [{"prompt": row["prompt"]} for row in pairs()])
    flags = {"init_from": str(tmp_path / "gpt2"), "data": str(folder / "prompts.jsonl")}
    run("ppo", folder, reward=reward, **flags)
    assert not (folder / "sft.pt").exists() and load_checkpoint(folder / "ppo.pt", "ppo")["iter"] == 3
    run("ppo", folder, reward=reward, resume=True, max_iters=4, **flags)
    run("rm", folder, init_from=str(tmp_path / "gpt2"), max_iters=1)  # the reward model may start from there as well
    with pytest.raises(UserError, match="has 257 tokens and the tokenizer atlas 508: give the model's own"):
        run("ppo", folder, reward=reward, overwrite=True, **flags | {"tokenizer": "atlas"})


def test_a_run_from_pretrained_weights_has_lower_learning_rates(world, tmp_path, capsys, monkeypatch):
    """Also where the weights of its sft.pt were, and they are said."""
    shrink(monkeypatch)
    folder = world("sft", "llama")
    start, reward = str(folder / "llama"), reward_file(tmp_path, "[float(len(r)) for r in responses]")
    for stage, flags, lr in (("sft", {"init_from": start}, 1e-5), ("rm", {}, 1e-5), ("ppo", {}, 5e-6)):
        run(stage, folder, lr=None, **flags)
        assert metrics(folder, stage)[-1]["lr"] == lr
        assert f"--lr={lr:g} by default, as the run starts from pretrained weights" in capsys.readouterr().out
    run("ppo", folder, lr=None, init_from=start, reward=reward, overwrite=True)
    assert metrics(folder, "ppo")[-1]["lr"] == 5e-6
    run("ppo", folder, lr=1e-3, overwrite=True)
    assert metrics(folder, "ppo")[-1]["lr"] == 1e-3
    scratch = world("ppo")
    run("ppo", scratch, lr=None)
    assert metrics(scratch, "ppo")[-1]["lr"] == 4e-4


def test_block_size_lowers_the_context_of_rope_and_of_nothing_else(world, tmp_path):
    folder = world("sft", "llama")
    run("sft", folder, init_from=str(folder / "llama"), block_size=32)
    assert load_checkpoint(folder / "sft.pt", "sft")["model_config"]["block_size"] == 32
    run("rm", folder)
    run("ppo", folder, block_size=24)
    assert load_checkpoint(folder / "ppo.pt", "ppo")["model_config"]["block_size"] == 24
    with pytest.raises(UserError, match="--block_size=65 does not match the checkpoint's block_size=64"):
        run("sft", folder, init_from=str(folder / "llama"), block_size=65, overwrite=True)
    save_pretrained(GPT(GPTConfig(vocab_size=257, **SIZES)), get_tokenizer("bytes"), tmp_path / "gpt2")
    with pytest.raises(UserError, match="--block_size=32 does not match"):
        run("sft", folder, init_from=str(tmp_path / "gpt2"), block_size=32, overwrite=True)
    for arch, start in (("gpt2", folder / "llama"), ("llama", tmp_path / "gpt2")):
        with pytest.raises(UserError, match=f"--arch={arch} does not match the checkpoint"):
            run("sft", folder, init_from=str(start), arch=arch, overwrite=True)


def test_an_occupied_out_dir_needs_overwrite_which_replaces_ppo_alone(world):
    folder = world("ppo")
    run("ppo", folder)
    before = {name: (folder / name).read_bytes() for name in ("sft.pt", "rm.pt", "ppo.pt", "metrics.jsonl")}
    with pytest.raises(UserError, match="ppo.pt is there already"):
        run("ppo", folder, seed=1)
    assert all((folder / name).read_bytes() == content for name, content in before.items())
    run("ppo", folder, seed=1, overwrite=True)
    changed = [name for name, content in before.items() if (folder / name).read_bytes() != content]
    assert changed == ["ppo.pt", "metrics.jsonl"]


def test_the_last_table_shows_ten_questions_before_and_after(world, capsys):
    """Showing samples changes nothing in the run."""
    looked, plain = world("ppo", "atlas"), world("ppo", "atlas")
    run("ppo", looked, sample_interval=1)
    table = capsys.readouterr().out.split("the same questions before")[1]
    assert table.count("    before ") == table.count("    after ") == 10
    run("ppo", plain)
    assert digest(weights(looked, "ppo")) == digest(weights(plain, "ppo"))


# ----------------------------------------------------------------------------------------------------------
# slow: recomputed activations, the default job, real files

@pytest.mark.slow
def test_train_ppo_hands_recompute_on_to_the_stages_that_it_runs_first(tmp_path, capsys):
    write_jsonl(tmp_path / "pairs.jsonl", pairs())
    run("ppo", tmp_path, max_iters=1, recompute=True, **SIZES)
    assert capsys.readouterr().out.count("float32, activations recomputed") == 3


def script(*argv, cwd=ROOT, **env):
    process = subprocess.run([sys.executable, str(ROOT / argv[0]), *argv[1:]], cwd=cwd, capture_output=True,
                             text=True,
                             env=os.environ | env)
    assert process.returncode == 0, process.stderr[-2000:]
    return process.stdout


@pytest.mark.slow
def test_the_default_job_learns_the_answers_and_prints_the_table(default_run):
    folder, out = default_run
    rows = metrics(folder, "ppo")
    # Four seeds on one thread: means of the last ten from 0.964 to 0.985, and 0.950 to 0.986 on the held-out questions.
    assert sum(row["gold"] for row in rows[-10:]) / 10 >= 0.95 and rows[-1]["gold_heldout"] >= 0.9
    assert rows[0]["gold"] < 0.5
    assert rows[-1]["eos_rate"] > 0.95 and all(row["ratio_first"] == 0 for row in rows)
    table = out.split("the same questions before")[1]
    assert table.count("    before ") == table.count("    after ") == 10


REAL = ["hh_harmless_base_test.jsonl.gz", "llmbar_mtbench_human_pairs.jsonl.gz",
        "hhh_alignment_pairs.jsonl.gz"]


@pytest.mark.slow
@pytest.mark.parametrize("file", REAL)
def test_real_comparisons_run_through_all_three_stages(file, tmp_path):
    if not (DATA / file).exists():
        pytest.skip(f"{DATA / file} is not there")
    where = [f"--data={DATA / file}", "--tokenizer=gpt2", f"--out_dir={tmp_path}", "--device=cpu"]
    env = {"TIKTOKEN_CACHE_DIR": str(DATA / "tiktoken_cache")}
    printed = [script("train_sft.py", *where, "--n_layer=1", "--n_head=2", "--n_embd=32", "--max_iters=3",
                      "--batch_size=4", **env),
               script("train_rm.py", *where, "--max_iters=3", "--batch_size=4", "--max_new_tokens=8", **env),
               script("train_ppo.py", *where, "--max_iters=2", "--batch_size=8", "--minibatches=2",
                      "--max_new_tokens=8", **env)]
    for stage, text in zip(STAGES, printed):
        assert load_checkpoint(tmp_path / f"{stage}.pt", stage)["finished"]
        assert re.search(r"train: [\d,]+ rows, held out: [\d,]+", text)
        if file.startswith("hh_"):
            assert re.search(r"dropped \d: the two prompts differ", text)
    assert all(row["ratio_first"] == 0 for row in metrics(tmp_path, "ppo"))
