"""Tests of support/flags.py: flags from the command line, their domains and their help."""

import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

import sample
import train_ppo
import train_rm
import train_sft
from paths import ROOT
from support.flags import Flags, UserError, check_domains, describe_flags, parse_flags, resolve_sizes, run_script
from tiny import Config

CONFIGS = [train_sft.Config, train_rm.Config, train_ppo.Config, sample.Config]


@pytest.mark.parametrize("argv, name, value", [
    ("--lr=1e-5", "lr", 1e-5), ("--lr 1e-5", "lr", 1e-5), ("--kl-coef=2", "kl_coef", 2.0),
    ("--kl_coef=2", "kl_coef", 2.0), ("--kl-coef 2", "kl_coef", 2.0), ("--compile", "compile", True),
    ("--compile=true", "compile", True), ("--compile=false", "compile", False),
    ("--compile no", "compile", False),
    ("--compile --lr=1", "compile", True), ("--skip-bad=1", "skip_bad", True),
    ("--width=none", "width", None),
    ("--width=None", "width", None), ("--width=7", "width", 7), ("--rate=none", "rate", None),
    ("--data=a.jsonl --data=b.jsonl", "data", "b.jsonl"), ("", "lr", 0.1)])
def test_every_spelling_of_a_flag(argv, name, value):
    parsed = getattr(parse_flags(Config, argv.split()), name)
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize("argv, says", [
    ("--lrr=1", "unknown flag --lrr, did you mean --lr?"), ("--kl-coeff 1", "did you mean --kl_coef?"),
    # argparse alone would take it for an abbreviation
    ("--micro_batch=4", "did you mean --micro_batch_size?"),
    ("--zzzzzz", "unknown flag --zzzzzz"), ("stray", "unknown flag stray"),
    ("--lr=fast", "'fast' is not a number"), ("--width=2.5", "'2.5' is not a whole number"),
    ("--compile=maybe", "'maybe' is neither true nor false"), ("--lr", "expected one argument"),
    ("--lr=none", "'none' is not a number")])
def test_a_flag_that_does_not_parse_exits_2_with_a_sentence(argv, says, capsys):
    with pytest.raises(SystemExit) as exit:
        parse_flags(Config, argv.split())
    out, err = capsys.readouterr()
    assert exit.value.code == 2 and says in err and err.count("\n") == 1 and not out


@pytest.mark.parametrize("config_class", [Config, *CONFIGS], ids=lambda c: c.__module__)
def test_every_flag_has_a_comment_and_help_lists_it_with_its_default(config_class, capsys):
    comments = {name: text for name, (_, text) in describe_flags(config_class)[0].items()}
    with pytest.raises(SystemExit) as exit:
        parse_flags(config_class, ["--help"])
    listed = " ".join(capsys.readouterr().out.split())
    assert exit.value.code == 0
    for field in dataclasses.fields(config_class):
        assert len(comments[field.name]) > 5
        assert f"--{field.name}" in listed
        default = "" if field.default is None else f" (default {field.default})"
        assert " ".join(comments[field.name].split()) + default in listed


def test_a_scripts_own_comment_replaces_the_shared_one():
    assert describe_flags(train_sft.Config)[0]["lr"] != describe_flags(Flags)[0]["lr"]


@pytest.mark.parametrize("config_class", CONFIGS, ids=lambda c: c.__module__)
def test_every_numeric_flag_has_a_domain(config_class):
    """NaN, infinity and whatever lies below the domain are refused."""
    numeric = [name for name, kind in get_type_hints(config_class).items()
               if {int, float} & {kind, *get_args(kind)}]
    assert len(numeric) >= 4
    for name in numeric:
        for value in (math.nan, math.inf, -math.inf, -1):
            with pytest.raises(UserError, match=rf"--{name}={value} must lie in "):
                check_domains(dataclasses.replace(config_class(), **{name: value}))
        check_domains(config_class())  # the defaults are allowed


@pytest.mark.parametrize("name, bad, good", [
    ("lam", 1.0001, 1.0), ("gamma", 1.0001, 0.0), ("clip", 1.0, 0.999), ("clip", 0.0, 1e-3),
    ("temperature", 0.0, 1e-3),
    ("grad_clip", 0.0, 1e-3), ("batch_size", 0, 1), ("kl_target", 0.0, 1e-3), ("block_size", 1, 2),
    ("device", "gpu", "cuda"), ("dtype", "float16", "bfloat16"), ("kl_in", "both", "loss"),
    ("critic", "own", "separate")])
def test_the_ends_of_a_domain(name, bad, good):
    check_domains(train_ppo.Config(**{name: good}))
    with pytest.raises(UserError, match=f"--{name}={bad} must "):
        check_domains(train_ppo.Config(**{name: bad}))


def test_data_that_cannot_be_read_is_refused_with_the_reason(tmp_path, monkeypatch):
    def check(path):
        Config(max_iters=1, batch_size=1, data=str(path)).check()
    file = tmp_path / "a.jsonl"
    file.touch()
    check(file)
    for path, says in ((tmp_path / "b.jsonl", "No such file or directory"), (tmp_path, "Is a directory"),
                       (file / "c.jsonl", "Not a directory")):
        with pytest.raises(UserError, match=f"--data={path}: {says}: give a file that can be read"):
            check(path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe: Not a file but a pipe or a device, and a run reads its data several"):
        check(tmp_path / "pipe")
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.R_OK)  # root may read anything
    with pytest.raises(UserError, match=f"--data={file}: Permission denied: give"):
        check(file)


def test_resume_and_overwrite_together_are_refused():
    with pytest.raises(UserError, match="give one of them"):
        Config(max_iters=1, batch_size=1, resume=True, overwrite=True).check()


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_package_that_is_asked_for_and_missing_is_said_in_a_sentence(package, monkeypatch):
    Config(max_iters=1, batch_size=1).check()  # nobody needs it who did not ask
    monkeypatch.setitem(sys.modules, package, None)
    Config(max_iters=1, batch_size=1).check()
    with pytest.raises(UserError, match=f"--{package} needs the package {package}: pip install {package}, or leave"):
        Config(max_iters=1, batch_size=1, **{package: True}).check()


@pytest.mark.parametrize("data, folder",
                         [("atlas", "out/atlas"), ("a/pairs.jsonl", "out/pairs"), ("hh.jsonl.gz", "out/hh")])
def test_out_dir_is_named_after_the_data(data, folder):
    assert Config(data=data).folder == Path(folder)
    assert Config(data=data, out_dir="x").folder == Path("x")


class DataProblem(ValueError):
    pass


@pytest.mark.parametrize("error, code", [
    (UserError("bad value"), 2), (DataProblem("bad value"), 2),
    (OSError("could not write a.pt (disk full)"), 1), (FloatingPointError("bad"), 1)])
def test_an_error_of_the_user_or_the_machine_is_a_sentence_and_a_code(error, code, monkeypatch, capsys):
    def train(config):
        raise error
    monkeypatch.setattr("sys.argv", ["dir/train_x.py"])
    with pytest.raises(SystemExit) as exit:
        run_script(train, Config, "doc", DataProblem)
    assert exit.value.code == code and capsys.readouterr().err == f"train_x.py: {error}\n"


def test_main_lets_a_bug_show_its_traceback(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train_x.py"])
    with pytest.raises(ZeroDivisionError):
        run_script(lambda config: 1 / 0, Config, "doc", DataProblem)


SCREEN = """
import os, pathlib, sys
from sample import Config
from support.flags import run_script
def main(config):
    print("warming up", flush=True)
    {body}
    pathlib.Path("done").touch()
run_script(main, Config, "doc")
"""


def on_a_screen(body, folder, **options):
    """A process of run_script that runs `body` and then makes a file "done"."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUTF8": "0"} | options.pop("env", {})
    return subprocess.Popen([sys.executable, "-c", SCREEN.format(body=body)], cwd=folder, text=True, env=env,
                            stderr=subprocess.PIPE, **options)


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_a_character_that_the_screen_lacks_is_escaped(encoding, tmp_path):
    process = on_a_screen(r"print('caf\xe9 \u6771\ufffd\ud800'); sys.stderr.write('\u6771\n')", tmp_path,
                          stdout=subprocess.PIPE, env={"PYTHONIOENCODING": encoding}, encoding=encoding)
    out, err = process.communicate()
    assert process.returncode == 0, err
    escaped = "caf\xe9 \u6771\ufffd\ud800".encode(encoding, "backslashreplace").decode(encoding)
    assert out == f"warming up\n{escaped}\n" and (tmp_path / "done").exists()
    assert err == "\u6771\n".encode(encoding, "backslashreplace").decode(encoding)


@pytest.mark.parametrize("flush", [True, False])
def test_a_run_continues_when_nobody_reads_its_screen_any_more(flush, tmp_path):
    process = on_a_screen(f"sys.stdin.readline(); [print(i, flush={flush}) for i in range(9)]", tmp_path,
                          stdout=subprocess.PIPE, stdin=subprocess.PIPE)
    assert process.stdout.readline() == "warming up\n"
    process.stdout.close()
    process.stdin.write("now\n"), process.stdin.close()
    err = process.stderr.read()
    assert process.wait() == 0 and (tmp_path / "done").exists()
    assert err == "note: stdout cannot be written any more (Broken pipe): continuing without it\n"


def test_a_run_continues_when_its_log_is_on_a_full_disk(tmp_path):
    with open("/dev/full", "w") as full:
        process = on_a_screen("[print(i, flush=True) for i in range(9)]", tmp_path, stdout=full)
        err = process.stderr.read()
    assert process.wait() == 0 and (tmp_path / "done").exists()
    assert err == "note: stdout cannot be written any more (No space left on device): continuing without it\n"


def test_a_script_without_a_console_prints_nothing(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_x.py"]), monkeypatch.setattr(sys, "stdout", None)
    assert run_script(lambda config: print("nothing") or 7, Config, "doc") == 7


@pytest.mark.parametrize("name", ["n_layer", "n_head", "n_embd", "block_size"])
def test_sizes_come_from_the_flag_the_default_or_the_checkpoint(name):
    """No flag may contradict the checkpoint."""
    model = {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 64, "vocab_size": 9}
    defaults = resolve_sizes(Config())
    assert resolve_sizes(Config(**{name: 8})) == defaults | {name: 8}
    assert resolve_sizes(Config(**{name: model[name]}), model) == {k: model[k] for k in defaults}
    with pytest.raises(UserError, match=f"--{name}=8 does not match the checkpoint's {name}={model[name]}"):
        resolve_sizes(Config(**{name: 8}), model)


def test_none_is_a_word_where_the_domain_has_it():
    """--chat=none refuses messages, and is not the default."""
    assert parse_flags(train_sft.Config, ["--chat=none", "--init_from=none"]).chat == "none"
    assert parse_flags(train_sft.Config, ["--init_from=none"]).init_from is None
