"""Tests of the three stages together: train_ppo.py runs the missing ones, the default job learns, real files work."""

import os
import re
import subprocess
import sys

import pytest

from paths import DATA, ROOT
from support import checkpoint
from support.checkpoint import digest, load_checkpoint
from support.flags import UserError
from tiny import SIZES, STAGES, metrics, pairs, run, shrink, weights, write_jsonl


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
