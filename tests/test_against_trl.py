"""Tests of experiments/against_trl.py: ratios are formed within a round, unequal work is refused, a missing TRL is said
in a sentence; and, where TRL is installed, that both sides do the same work."""

import sys

import pytest
import torch

from experiments import against_trl
from support import flags
from tools import bench

SIZE = bench.Size(n_layer=1, n_head=2, n_embd=32, vocab_size=300, batch_size=8, prompt_len=5, response_len=6, epochs=2,
                  minibatches=2)


def turns(*seconds, **row):
    return [{"seconds": s, "matmul": "highest", "tokens": 48, "optimizer_steps": 4} | row for s in seconds]


def test_a_ratio_is_the_median_over_rounds_and_the_best_is_the_fastest(capsys):
    against_trl.print_tables({"trl-float32": turns(10, 40, 12), "trl-bfloat16": turns(9, 8, 7),
                              "ours-float32": turns(2, 4, 3), "ours-bfloat16": turns(1, 8, 1)})
    screen = capsys.readouterr().out
    assert "| float32 against float32 | trl-float32 / ours-float32 | 5.00 | 5.00, 10.00, 4.00 |" in screen
    assert "TRL's default | trl-float32 / ours-bfloat16 | 10.00 | 10.00, 5.00, 12.00 |" in screen
    assert "| best against best | trl-bfloat16 / ours-bfloat16 | 7.00 |" in screen
    assert "separate critic" not in screen and "sampling" not in screen


def test_unequal_work_is_refused(monkeypatch):
    monkeypatch.setattr(against_trl, "require_peers", lambda: None)
    monkeypatch.setattr(against_trl, "hold", lambda names, *args: {
        name: turns(1.0, optimizer_steps=16 if name == "ours-float32" else 4) for name in names})
    monkeypatch.setitem(bench.PRESETS, "tiny", SIZE)
    with pytest.raises(flags.UserError, match=r"unequal work.*\(48, 4\), \(48, 16\)"):
        against_trl.main(against_trl.Config(device="cpu", contenders="ours-float32,trl-float32"))


def test_a_missing_trl_and_an_unknown_contender_are_said_in_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(flags.UserError, match="pip install trl==1.12.0"):
        against_trl.main(against_trl.Config())
    with pytest.raises(flags.UserError, match="choose from .*ours-float32"):
        against_trl.main(against_trl.Config(contenders="verl"))


def test_contenders_take_turns_and_the_warm_up_is_not_in_the_rows(tmp_path, capsys):
    bench.write_inputs(tmp_path, SIZE)
    names = ["ours-float32-separate", "generate-bfloat16"]
    rows = against_trl.hold(names, tmp_path, SIZE, torch.device("cpu"), rounds=2)
    assert {name: len(turns) for name, turns in rows.items()} == dict.fromkeys(names, 2)
    assert {row["tokens"] for turns in rows.values() for row in turns} == {48}
    assert {row.get("optimizer_steps") for turns in rows.values() for row in turns} == {4, None}
    order = [line.split()[2] for line in capsys.readouterr().out.splitlines()]
    assert order == names * 2


@pytest.mark.slow
def test_trl_does_as_many_optimizer_steps_on_as_many_tokens(monkeypatch):
    pytest.importorskip("trl.experimental.ppo", reason="TRL is optional")
    monkeypatch.setitem(bench.PRESETS, "tiny", SIZE)
    names = ["ours-float32", *against_trl.TRL, "transformers-float32"]
    rows = against_trl.main(against_trl.Config(device="cpu", rounds=1, contenders=",".join(names)))
    assert list(rows) == names
    assert [rows[name][0]["matmul"] for name in against_trl.TRL] == ["highest", "medium", "highest"]
    assert rows["trl-float32"][0]["optimizer_steps"] == 4 and rows["trl-float32"][0]["tokens"] == 48
