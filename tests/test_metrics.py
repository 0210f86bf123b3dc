"""
Tests of metrics.py: the file, the line on the screen, the rules that warn, and the same numbers elsewhere.

The rules are tried on a healthy run, drawn through a few real numbers, and on that run with one thing spoiled.
"""

import json
import math
import random
import re
import sys
import time
import types

import pytest
import torch

import train_ppo
from paths import ROOT
from support import metrics
from support.metrics import HEALTH, Metrics
from tiny import Config

PAGE = (ROOT / "docs" / "metrics.md").read_text()


def write_metrics(folder, stage, iterations, start=0, show={"loss": "6.2f"}, config=None, **more):
    out = Metrics(config or Config(out_dir=str(folder), max_iters=9, log_interval=5), stage, start)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(metrics.COLUMNS, stage, show)
        return [out.write(i, {"loss": float(i)} | {name: value(i) if callable(value) else value
                                                   for name, value in more.items()}) for i in iterations]


def lines(folder):
    def refuse(literal):
        raise ValueError(f"{literal} is not JSON")
    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def outline(folder):
    return [(line["stage"], line.get("iter", "header")) for line in lines(folder)]


# ----------------------------------------------------------------------------------------------------------
# the file

def test_each_stage_begins_with_a_header_that_says_what_made_the_lines(tmp_path):
    write_metrics(tmp_path, "sft", [1])
    header, line = lines(tmp_path)
    assert header.keys() >= {"stage", "flags", "torch", "device", "commit"} and "iter" not in header
    assert header["torch"] == torch.__version__ and header["flags"]["log_interval"] == 5
    assert line.keys() == {"stage", "iter", "seconds", "loss"} and line["seconds"] >= 0


def test_nan_and_infinity_become_null_and_tensors_numbers(tmp_path):
    write_metrics(tmp_path, "sft", [1], nan=math.nan, inf=torch.tensor(-math.inf), none=None,
                  n=torch.tensor(3), x=torch.tensor(0.5))
    line = lines(tmp_path)[1]
    assert (line["nan"], line["inf"], line["none"], line["n"], line["x"]) == (None, None, None, 3, 0.5)


def test_without_the_git_program_the_commit_is_unknown(tmp_path, monkeypatch):
    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(metrics, "__file__", str(tmp_path / "support" / "metrics.py"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert metrics.header(Config(out_dir=str(tmp_path)), "sft")["commit"] is None


H = "header"


@pytest.mark.parametrize("start, then, expected", [
    (0, [1], [("rm", H), ("rm", 1), ("sft", H), ("sft", 1)]),
    (2, [3, 4], [("sft", H), ("sft", 1), ("sft", 2), ("rm", H), ("rm", 1), ("sft", 3), ("sft", 4)])],
    ids=["a fresh start drops this stage's lines alone",
         "resuming drops this stage's lines past the checkpoint"])
def test_opening_the_metrics_file(start, then, expected, tmp_path):
    write_metrics(tmp_path, "sft", [1, 2, 3]), write_metrics(tmp_path, "rm", [1])
    write_metrics(tmp_path, "sft", then, start)
    assert outline(tmp_path) == expected
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("left", [b'{"stage": "sft", "iter": 3, "lo', b'{"stage": "sft", "flags": {"lr": 1}',
                                  b"\0" * 40, b"\xff\xfe", b"3", b"{}", b"null"])
def test_what_a_crash_left_of_a_line_does_not_prevent_resuming(left, tmp_path):
    write_metrics(tmp_path, "sft", [1, 2])
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(left)
    write_metrics(tmp_path, "sft", [3], start=2)
    assert outline(tmp_path) == [("sft", H), ("sft", 1), ("sft", 2), ("sft", 3)]


# ----------------------------------------------------------------------------------------------------------
# the screen

def test_log_interval_thins_the_screen_and_not_the_file(tmp_path, capsys):
    """The first and the last line are always on the screen."""
    write_metrics(tmp_path, "sft", range(1, 10))
    screen = [re.sub(r"eta +[\d-]+:[\d-]{2}", "eta", line) for line in capsys.readouterr().out.splitlines()]
    assert screen == [f"sft {i}/9  eta  loss   {i}.00" for i in (1, 5, 9)]
    assert [line["iter"] for line in lines(tmp_path)[1:]] == list(range(1, 10))


def test_columns_stay_where_they_are(tmp_path, capsys):
    """Numbers within their format never move a column; one that is wider moves it once, not back and forth."""
    wide = [1.0, 9.9, 10.1, 123.0, 9.9, -123.0, 4567.0, 1.0, 4567.0]
    write_metrics(tmp_path, "sft", range(1, 10), config=Config(out_dir=str(tmp_path), max_iters=9, log_interval=1),
                  wide=lambda i: wide[i - 1], tight=lambda i: wide[i - 1], seldom=lambda i: 1.0 if i % 4 == 1 else None,
                  show={"wide": "+9.2f", "loss": "6.2f", "tight": ".2f", "grad": ".2f", "seldom": ".2f"})
    screen = capsys.readouterr().out.splitlines()
    assert len({(line.index("wide"), line.index("loss"), line.index("tight")) for line in screen}) == 1
    ends = [len(line.split("  seldom")[0]) for line in screen]
    assert ends == sorted(ends) and len(set(ends)) == 4  # 1.00, 10.10, 123.00, -123.00
    assert [line.endswith("seldom 1.00") for line in screen] == [i % 4 == 1 for i in range(1, 10)]


def test_a_long_name_is_short_on_the_screen_and_whole_in_the_file(tmp_path, capsys):
    write_metrics(tmp_path, "sft", [1], show={"eos_rate": ".2f", "loss": ".2f"}, eos_rate=1.0)
    assert capsys.readouterr().out.endswith("  eos 1.00  loss 1.00\n") and lines(tmp_path)[1]["eos_rate"] == 1.0
    assert all(f"`{name}`" in PAGE and f"`{short}`" in PAGE for name, short in metrics.SHORT.items())


@pytest.mark.parametrize("seconds, eta", [(0.5, "  0:03"), (8.571, "  0:59"), (8.572, "  1:00"), (900, "105:00")])
def test_the_time_left_leaves_out_the_first_iteration(seconds, eta, tmp_path, capsys, monkeypatch):
    """The first iteration warms up: it has no estimate and spoils none."""
    clock = iter([0.0, 500.0, 500.0 + seconds, 500.0 + 9 * seconds])
    monkeypatch.setattr(metrics.time, "time", lambda: next(clock))
    write_metrics(tmp_path, "sft", [1, 2, 9], config=Config(out_dir=str(tmp_path), max_iters=9, log_interval=1))
    first, second, last = capsys.readouterr().out.splitlines()
    assert "  eta   -:--  " in first and f"  eta {eta}  " in second and "  eta   0:00  " in last


def test_a_line_is_shown_after_ten_seconds_of_silence(tmp_path, capsys, monkeypatch):
    """Every iteration of a slow run has a line; a fast run has one in ten seconds, whatever log_interval says."""
    clock = iter([0.0, 1.0, 6.0, 11.5, 12.0, 40.0, 80.0])
    monkeypatch.setattr(metrics.time, "time", lambda: next(clock))
    write_metrics(tmp_path, "sft", range(1, 7), config=Config(out_dir=str(tmp_path), max_iters=99, log_interval=90))
    assert [line.split("/")[0].split()[1] for line in capsys.readouterr().out.splitlines()] == ["1", "3", "5", "6"]


def test_a_slow_phase_says_every_ten_seconds_that_it_is_at_work(capsys, monkeypatch):
    monkeypatch.setattr(metrics, "SILENCE", 0.05)
    with metrics.progress("reading a.jsonl", lambda: "half"):
        time.sleep(0.13)
    assert re.findall(r"^reading a.jsonl: 0 s half$", capsys.readouterr().out, re.MULTILINE)
    with metrics.progress("reading a.jsonl"):
        pass
    assert capsys.readouterr().out == ""


# ----------------------------------------------------------------------------------------------------------
# the rules

FLAGS = {"dtype": "auto", "compile": False, "critic": "separate", "reward": "rm", "grad_clip": 1.0}
HEALTHY = {  # the default run (seed 0, commit 738ccf3) at these iterations; between them, straight lines and noise
    "iter": (1, 2, 3, 5, 8, 12, 16, 24, 40, 70, 100),
    "score": (-0.12, 0.24, 0.27, 0.45, 0.60, 0.72, 0.82, 0.91, 0.92, 0.99, 0.96),
    "kl": (0.00, 0.11, 0.29, 0.53, 0.68, 1.25, 1.91, 2.12, 2.00, 2.21, 2.21),
    "entropy": (0.70, 0.60, 0.55, 0.49, 0.42, 0.30, 0.17, 0.095, 0.065, 0.03, 0.028),
    "clip_frac": (0.063, 0.019, 0.01, 0.0098, 0.012, 0.0031, 0.005, 0.00063, 0.00063, 0.0, 0.00062),
    "approx_kl": (0.0093, 0.0022, 0.0014, 0.0012, 0.0011, 0.00084, 0.00049, 0.00034, 0.00014, 1.4e-05, 4.6e-05),
    "explained_variance": (0.08, 0.03, 0.22, 0.30, 0.40, 0.33, 0.35, 0.41, 0.43, 0.62, 0.57),
    "grad_norm": (0.88, 0.78, 0.86, 0.85, 1.05, 1.21, 1.03, 1.44, 1.42, 0.73, 1.18)}
NOISE = {"score": 0.03, "kl": 0.08, "explained_variance": 0.03}


def healthy(n=100, seed=0, flags={}):
    """The lines of a healthy run, header first."""
    rng, rows = random.Random(seed), [{"stage": "ppo", "flags": FLAGS | flags, "cuda": False}]
    at = HEALTHY["iter"]
    for i in range(1, n + 1):
        k = max(k for k in range(len(at) - 1) if at[k] <= i)
        share = (i - at[k]) / (at[k + 1] - at[k])
        row = {name: y[k] + share * (y[k + 1] - y[k]) + rng.gauss(0, NOISE.get(name, 0)) for name, y in HEALTHY.items()}
        rows.append(row | {"stage": "ppo", "iter": i, "kl_coef": 0.05, "response_len": 6.3, "eos_rate": 1.0, "lr": 4e-4,
                           "score_std": 1.0,
                           "ratio_first": 0.0, "logprob_gap": 5e-7, "skipped_steps": 0})
    return rows


def broken(rows):
    """[(rule, iteration)] of a run, each rule at its first time."""
    seen, found = rows[:1], {}
    for row in rows[1:]:
        seen.append(row)
        for rule in HEALTH:
            if rule not in found and rule.broken(seen):
                found[rule] = row["iter"]
    return list(found.items())


@pytest.mark.parametrize("seed", range(8))
def test_no_rule_breaks_in_a_healthy_run(seed):
    assert broken(healthy(seed=seed)) == []


def from_40(**changes):
    """Spoils a healthy run from iteration 40 to 65: a number replaces a metric, a function maps (value, iteration)."""
    def spoil(rows):
        for row in rows[40:]:
            row |= {name: change(row[name], row["iter"]) if callable(change) else change
                    for name, change in changes.items()}
        return rows[:66]
    return spoil


def at_every(**changes):
    """Spoils a healthy run in the same way, from its start."""
    def spoil(rows):
        return [rows[0], *(row | {name: change(row["iter"]) for name, change in changes.items()} for row in rows[1:])]
    return spoil


def collapse(rows):
    """Sure of an answer within ten iterations, and it is no better than what it said before."""
    for row in rows[1:]:
        row |= {"entropy": max(0.69 - 0.07 * row["iter"], 0.001), "score": 0.1 if row["iter"] > 5 else 0.0, "kl": 1.0}
    return rows


BREAKS = [  # what is spoiled, the metric that the one warning names, the flag to try, by when it comes
    (from_40(kl=-0.3), "kl", "--dtype", 44),
    (from_40(kl=lambda kl, i: kl + i - 40, kl_coef=0.0), "kl", "--kl_coef", 50),
    # score rises by 0.01 in an iteration, and the KL that pays for it by 0.3
    (from_40(score=lambda score, i: score + (i - 40) / 100, kl=lambda kl, i: kl + 0.3 * (i - 40), response_len=90.0),
     "score", "--lr", 60),
    (from_40(eos_rate=lambda rate, i: max(0.0, 1 - (i - 40) / 10)), "eos_rate", "--eos_penalty", 50),
    (at_every(eos_rate=lambda i: max(0.0, 0.08 - 0.01 * max(0, i - 5))), "eos_rate", "--eos_penalty", 15),
    (at_every(eos_rate=lambda i: 0.0), "eos_rate", "--max_new_tokens", 5),
    (collapse, "entropy", "--ent_coef", 15),
    (from_40(ratio_first=1e-6), "ratio_first", "--dtype", 40),
    (from_40(logprob_gap=2e-4), "logprob_gap", "--dtype", 40),
    (from_40(clip_frac=0.4), "clip_frac", "--lr", 44),
    (from_40(approx_kl=0.15), "approx_kl", "--target_kl", 44),
    (from_40(explained_variance=-0.1), "explained_variance", "--lr", 60),
    (from_40(grad_norm=11.0), "grad_norm", "--lr", 44),
    (from_40(kl=40.0, response_len=128.0, kl_coef=0.0), "kl", "--kl_coef", 44),  # a third of a nat per token
    (from_40(score_std=0.0), "score_std", "--reward", 42),
    (from_40(skipped_steps=1), "skipped_steps", "--lr", 40)]


@pytest.mark.parametrize("spoil, metric, remedy, by", BREAKS, ids=[f"{metric} {flag}" for _, metric, flag, _ in BREAKS])
def test_each_rule_breaks_and_names_its_metric_with_a_flag_to_try(spoil, metric, remedy, by):
    rows = spoil(healthy())
    (rule, iteration), = broken(rows)
    assert rule.metric == metric and remedy in rule.remedy and iteration <= by
    sentence = rule.sentence(rows[:iteration + 1])
    assert sentence.startswith(f"{metric} ") and f". Likely cause: {rule.cause}. Try {rule.remedy}" in sentence
    assert "\n" not in sentence and re.search(r"\d", sentence.split(". Likely")[0])


def test_every_rule_is_broken_by_one_of_those():
    assert {broken(spoil(healthy()))[0][0] for spoil, *_ in BREAKS} == set(HEALTH)


def test_every_flag_that_a_rule_proposes_exists():
    known = train_ppo.Config.__dataclass_fields__
    assert all(name in known for rule in HEALTH for name in re.findall(r"--(\w+)", rule.remedy))


def test_the_page_on_metrics_names_each_rules_metric_and_flags():
    table = [line for line in PAGE.splitlines() if line.startswith("|")]
    for rule in HEALTH:
        row, = [line for line in table if f"`{rule.metric}`" in line.split("|", 2)[1]]
        assert "**warns**" in row and all(f"--{name}" in row for name in re.findall(r"--(\w+)", rule.remedy))


@pytest.mark.parametrize("flags, cuda, warns", [
    ({}, False, True), ({"dtype": "float32"}, False, True), ({"dtype": "bfloat16"}, False, False),
    ({"compile": True}, False, False), ({}, True, False)])
def test_only_float32_on_a_cpu_must_be_exact(flags, cuda, warns):
    """Whatever rounds may be off by a little, but not by much."""
    for metric, little in (("ratio_first", 1e-6), ("logprob_gap", 2e-4)):
        rows = from_40(**{metric: little})(healthy(flags=flags))
        rows[0]["cuda"] = cuda
        assert [rule.metric for rule, _ in broken(rows)] == [metric] * warns
        rows = from_40(**{metric: 0.06})(healthy(flags=flags))
        rows[0]["cuda"] = cuda
        assert [rule.metric for rule, _ in broken(rows)] == [metric]


@pytest.mark.parametrize("spoil, flags", [
    (from_40(explained_variance=-0.1), {"critic": None}),  # an objective without a critic
    (from_40(kl=15.0, response_len=50.0, kl_coef=0.0), {}),  # long answers may be that far from the SFT policy
    (from_40(kl=lambda kl, i: -1.0 if i == 40 else kl), {}),  # one rollout's noise
    (at_every(kl_coef=lambda i: 0.05 * 1.03 ** i), {}),    # --kl_target raises the price: J falls by itself
    (collapse, {"reward": "file.py:f"})])                  # a unit that nobody knows, and a gain that stayed
def test_what_looks_like_it_and_is_none_of_it_does_not_warn(spoil, flags):
    assert broken(spoil(healthy(flags=flags))) == []


def test_a_metric_that_is_missing_or_not_finite_stops_no_rule_and_no_run():
    rows = healthy()
    for row in rows[30:45]:
        row |= dict.fromkeys(HEALTHY.keys() - {"iter"})
    assert broken(from_40(eos_rate=None, ratio_first=None, skipped_steps=None, response_len=None)(rows)) == []
    assert broken([rows[0], *({"stage": "sft", "iter": i, "loss": 1.0} for i in range(1, 30))]) == []


def test_a_warning_is_printed_once_even_if_the_run_is_resumed(tmp_path, capsys):
    config = Config(out_dir=str(tmp_path), max_iters=9, log_interval=9)
    write_metrics(tmp_path, "sft", range(1, 6), config=config, skipped_steps=lambda i: int(i > 1))
    first = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert len(first) == 1 and first[0].startswith("warning: skipped_steps is 1: ")
    write_metrics(tmp_path, "sft", range(4, 10), start=3, config=config, skipped_steps=3, grad_norm=99.0)
    again = [line.split(" is ")[0] for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert again == ["warning: grad_norm"]
    write_metrics(tmp_path, "sft", range(2, 6), start=1, config=config, skipped_steps=1)
    assert "warning: skipped_steps" in capsys.readouterr().out  # nothing was wrong yet at iteration 1


# ----------------------------------------------------------------------------------------------------------
# the same numbers elsewhere

def test_tensorboard_and_wandb_get_every_number(tmp_path, monkeypatch):
    """A resumed run continues in the same place."""
    opened, scalars, runs, logged = [], [], [], []

    class Writer:
        def __init__(self, folder, purge_step):
            opened.append((folder, purge_step))

        def add_scalar(self, *scalar):
            scalars.append(scalar)

        def flush(self):
            scalars.append("flush")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    run = types.SimpleNamespace(log=logged.append, define_metric=lambda *a, **k: 0)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **flags: (runs.append(flags), run)[1]))

    config = Config(out_dir=str(tmp_path), max_iters=3, tensorboard=True, wandb=True)
    write_metrics(tmp_path, "sft", [1, 2], config=config, nothing=None)
    write_metrics(tmp_path, "sft", [2, 3], start=1, config=config)
    assert opened == [(tmp_path / "tensorboard" / "sft", 1), (tmp_path / "tensorboard" / "sft", 2)]
    assert [scalar for scalar in scalars if scalar[0] == "loss"] == [("loss", float(i), i) for i in (1, 2, 2, 3)]
    assert scalars.count("flush") == 4 and not [scalar for scalar in scalars if scalar[0] == "nothing"]
    assert [row["loss"] for row in logged] == [1.0, 2.0, 2.0, 3.0]
    assert runs[0]["id"] == runs[1]["id"] and runs[0]["dir"] == tmp_path and runs[0]["config"]["max_iters"] == 3
    monkeypatch.setattr(metrics.time, "strftime", lambda form: "another time")
    write_metrics(tmp_path, "sft", [1], config=config)
    assert runs[2]["id"] != runs[0]["id"]  # a fresh start is another run


def test_tensorboard_itself_reads_one_curve_after_a_resume(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    config = Config(out_dir=str(tmp_path), max_iters=4, tensorboard=True)
    write_metrics(tmp_path, "sft", [1, 2, 3], config=config, again=0.0)
    write_metrics(tmp_path, "sft", [2, 3, 4], start=1, config=config, again=1.0)
    events = EventAccumulator(str(tmp_path / "tensorboard" / "sft")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(i, i) for i in (1, 2, 3, 4)]
    assert [event.value for event in events.Scalars("again")] == [0, 1, 1, 1]
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "tensorboard"}
