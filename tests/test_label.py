"""
Tests of tools/label.py: one key is one choice, no choice is lost or asked twice, and train_rm.py reads what comes out.
At a terminal means at a real one: the script runs in a child of this process, behind a pseudo-terminal.
"""

import json
import os
import select
import signal
import sys
import time
import traceback
from contextlib import nullcontext

import pytest
import torch

import atlas
import data
import train_ppo
import train_rm
import train_sft
from support import stages
from support.flags import UserError
from tools import label
from tokenizer import tokenizer_id


def config(sft, folder, **flags):
    return label.Config(**{"init_from": sft, "pairs": str(folder / "pairs.jsonl"), "device": "cpu", "n": 5} | flags)


def keys(monkeypatch, typed):
    """What a person will type, one line each, where there is no terminal."""
    lines = iter([*(f"{key}\n" for key in typed), ""])
    pipe = type("Pipe", (), {"isatty": lambda self: False, "readline": lambda self: next(lines)})
    monkeypatch.setattr(sys, "stdin", pipe())


def rows(folder, name="pairs.jsonl"):
    path = folder / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# ----------------------------------------------------------------------------------------------------------
# the choice

def test_each_key_does_what_it_says_and_a_wrong_one_waits(sft, tmp_path, monkeypatch, capsys):
    keys(monkeypatch, "1x2ts q")
    label.main(config(sft, tmp_path))
    screen = capsys.readouterr().out
    shown = [block.split("\n\n") for block in screen.split("quit ")[:-1]]
    questions = [(parts[-3].strip("\n").split("\n")[-1], *(line[5:] for line in parts[-2].split("\n")))
                 for parts in shown]
    assert len(questions) == 5
    pairs, undecided = rows(tmp_path), rows(tmp_path, "pairs.undecided.jsonl")
    assert [(row["prompt"], row["chosen"], row["rejected"]) for row in pairs] == [
        questions[0], (questions[1][0], questions[1][2], questions[1][1])]
    assert [(row["verdict"], row["prompt"], row["first"], row["second"]) for row in undecided] == [
        ("tie", *questions[2]), ("skip", *questions[3])]
    assert "has 2 of 5 pairs; ties: 1, skips: 1" in screen.splitlines()[-1]


def test_the_two_answers_differ_have_ended_and_are_shuffled_by_seed(sft, monkeypatch):
    model, encoding, _ = label.load(sft, torch.device("cpu"))
    prompt = data.encode_prompt(encoding, "Where is Lima?")

    def pairs(seed, n, **flags):
        rng = label.generator("cpu", seed)
        return [label.two_answers(model, encoding, prompt, label.Config(**flags), rng) for _ in range(n)]
    first = pairs(0, 8)
    assert first == pairs(0, 8) != pairs(1, 8) and all(a != b for a, b in filter(None, first))
    assert pairs(0, 3, temperature=0.01) == [None] * 3  # all samples alike
    rollouts, real = [], label.generate

    def look(*args, **kwargs):
        rollouts.append(real(*args, **kwargs))
        return rollouts[-1]
    monkeypatch.setattr(label, "generate", look)
    assert any(pairs(0, 60, max_new_tokens=5)) and max(rollout.response_lens.max() for rollout in rollouts) == 5


def test_the_frequent_answer_does_not_always_come_first(monkeypatch):
    """Of samples in the order they came, the first is the frequent one more often than the second: here nine times in
    ten. Whoever labels would learn which is which."""
    encoding = atlas.tokenizer()
    often, seldom = ([*b"?", *data.encode_response(encoding, text)] for text in (" I do not know.", " It is in Peru."))

    def generate(model, prompts, lens, *args, generator, **kwargs):
        frequent = torch.rand(label.CANDIDATES, generator=generator) < 0.9
        tokens, lens = data.pad([often if f else seldom for f in frequent], encoding.eot_token)
        return type("Rollout", (), {"tokens": tokens, "response_lens": lens - 1})
    monkeypatch.setattr(label, "generate", generate)
    model = label.GPT(label.GPTConfig(block_size=8, vocab_size=9, n_layer=1, n_head=1, n_embd=2))
    rng = torch.Generator().manual_seed(0)
    pairs = [label.two_answers(model, encoding, [*b"?"], label.Config(), rng) for _ in range(400)]
    first = [pair[0] == " I do not know." for pair in pairs if pair]
    assert 0.4 < sum(first) / len(first) < 0.6


def test_what_a_terminal_would_obey_is_shown_as_text():
    assert label.printable("a\x1b[2Jb\r\u202ec\nd é") == "a\\x1b[2Jb\\r\\u202ec\n     d é"


@pytest.mark.parametrize("flags, says", [
    ({"labeller": "atlas", "data": "{folder}/p.jsonl"}, "--labeller=atlas judges answers to atlas questions only"),
    ({"labeller": "me"}, "--labeller=me must be one of you, atlas"), ({"n": 0}, "--n=0 must lie in"),
    ({"pairs": "pairs.txt"}, "--pairs=pairs.txt must end in .jsonl"),
    ({"init_from": "{folder}/nothing.pt"}, "nothing.pt is not there: train it first with train_sft.py")])
def test_bad_flags_are_refused_with_a_sentence(flags, says, sft, tmp_path):
    flags = {name: value.replace("{folder}", str(tmp_path)) if isinstance(value, str) else value
             for name, value in flags.items()}
    with pytest.raises(UserError, match=says):
        label.main(config(sft, tmp_path, **flags))
    assert not list(tmp_path.iterdir())


def test_prompts_of_a_file_are_asked_except_the_held_out_ones(sft, tmp_path, monkeypatch, capsys):
    prompts = [f"Where is {city}?" for city in [*atlas.CITIES][:40]]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    keys(monkeypatch, "1" * 60)
    label.main(config(sft, tmp_path, data=str(tmp_path / "p.jsonl"), n=60))
    _, heldout = data.split_rows([data.Row(prompt) for prompt in prompts])
    asked = {row["prompt"] for row in rows(tmp_path)}
    assert len(rows(tmp_path)) == 60 and len(asked) > 30 and asked <= set(prompts) - {row.prompt for row in heldout}


# ----------------------------------------------------------------------------------------------------------
# nothing is lost, nothing is asked twice

def by_atlas(sft, folder, **flags):
    folder.mkdir(exist_ok=True)
    label.main(config(sft, folder, labeller="atlas", **flags))
    return (folder / "pairs.jsonl").read_bytes()


def test_an_interrupted_session_goes_on_with_the_next_question(sft, tmp_path, monkeypatch, capsys):
    whole = by_atlas(sft, tmp_path / "whole", n=6)
    by_atlas(sft, tmp_path / "parts", n=2)
    assert by_atlas(sft, tmp_path / "parts", n=6) == whole
    for typed in "t", "s", "1":
        keys(monkeypatch, typed)
        label.main(config(sft, tmp_path, n=9))
    first = [(row["prompt"], {row["chosen"], row["rejected"]}) for row in rows(tmp_path / "whole")]
    undecided = [(row["prompt"], {row["first"], row["second"]}) for row in rows(tmp_path, "pairs.undecided.jsonl")]
    assert undecided + [(row["prompt"], {row["chosen"], row["rejected"]}) for row in rows(tmp_path)] == first[:3]


def test_no_pair_of_answers_to_a_prompt_is_asked_twice_whatever_the_seed(sft, tmp_path, capsys, monkeypatch):
    model, encoding, sha256 = label.load(sft, torch.device("cpu"))
    prompts = [data.encode_prompt(encoding, f"Where is {city}?") for city in ("Lima", "Oslo", "Rome")]
    monkeypatch.setattr(label, "two_answers",
                        lambda *args: [f" {n}." for n in torch.randperm(4, generator=args[-1])[:2]])
    for seed in 0, 1, 0:
        decisions, config = label.Decisions(tmp_path / "pairs.jsonl"), label.Config(labeller="atlas", n=100, seed=seed)
        label.label(model, encoding, prompts, config, decisions, sha256, None, None)
        assert "two passes over the prompts brought no pair that was not asked before" in capsys.readouterr().out
    asked = [(row["prompt"], frozenset((row["chosen"], row["rejected"]))) for row in rows(tmp_path)]
    assert len(asked) == len(set(asked)) > 12  # of 3 prompts x 6 pairs


def test_a_line_cut_anywhere_is_dropped_and_asked_again(sft, tmp_path, capsys):
    """A note says so, and the other lines stay."""
    whole = by_atlas(sft, tmp_path, n=4)
    path, start = tmp_path / "pairs.jsonl", whole[:-1].rindex(b"\n") + 1
    for end in range(start, len(whole)):
        path.write_bytes(whole[:end])
        capsys.readouterr()
        decisions = label.Decisions(path)
        if end in (start, len(whole) - 1):  # nothing of it was written; all of it but its end
            assert not capsys.readouterr().out and decisions.counts["pair"] == (3 if end == start else 4)
        else:
            assert f"{whole[start:end].decode(errors='replace')}\n" in capsys.readouterr().out
            assert decisions.counts["pair"] == 3 and path.read_bytes() == whole[:start]
    path.write_bytes(whole[:start + 30])
    assert by_atlas(sft, tmp_path, n=4) == whole


@pytest.mark.parametrize("line", ["not json", "[]", '{"prompt": "p", "chosen": " a"}',
                                  '{"chosen": "a", "rejected": "b"}', '{"prompt": 3, "chosen": "a", "rejected": "b"}'])
def test_a_file_that_is_not_ours_is_refused_and_not_touched(line, tmp_path):
    path, good = tmp_path / "pairs.jsonl", '{"prompt": "p", "chosen": " a", "rejected": " b"}\n'
    for text in (good + line + "\n" + good, good + line.replace('{"prompt', '{ "prompt')):
        path.write_text(text)
        with pytest.raises(UserError, match="pairs.jsonl:2 is not a row with prompt, chosen, rejected: correct it"):
            label.Decisions(path)
        assert path.read_text() == text


def test_pairs_that_somebody_else_wrote_are_kept_and_counted(sft, tmp_path):
    mine = '{"prompt": "p", "chosen": " a", "rejected": " b", "verdict": "mine"}\r\n\n'
    (tmp_path / "pairs.jsonl").write_bytes(mine.encode())
    assert by_atlas(sft, tmp_path, n=3).decode().startswith(mine)
    assert len(data.read_rows(tmp_path / "pairs.jsonl")[0]) == 3


def test_a_choice_is_in_the_file_when_the_next_question_is_shown(sft, tmp_path, monkeypatch):
    in_file = []
    monkeypatch.setattr(label, "ask", lambda *question: in_file.append(len(rows(tmp_path))) or 0)
    label.main(config(sft, tmp_path, n=4))
    assert in_file == [0, 1, 2, 3]


# ----------------------------------------------------------------------------------------------------------
# at a terminal

class Terminal:
    """A function in a child of this process whose keyboard and screen are a pseudo-terminal."""

    def __init__(self, body):
        pty = pytest.importorskip("pty")
        self.seen = ""
        self.pid, self.keyboard = pty.fork()
        if self.pid == 0:
            code = 99
            signal.signal(signal.SIGINT, signal.default_int_handler)  # or a suite behind an ampersand would ignore it
            try:
                sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)
                body()
                code = 0
            except SystemExit as exit:
                code = exit.code
            except BaseException:
                traceback.print_exc(file=sys.stdout)
            finally:
                sys.stdout.flush()
                os._exit(code)

    def read(self, until=None, seconds=60):
        """The screen since the last read, up to where `until` stands on it, or to its end."""
        deadline = time.time() + seconds
        while until is None or until not in self.seen:
            if not select.select([self.keyboard], [], [], max(0, deadline - time.time()))[0]:
                pytest.fail(f"no {until!r} after {seconds} seconds: {self.seen!r}")
            try:
                self.seen += os.read(self.keyboard, 4096).decode(errors="replace")
            except OSError:  # the child has gone, and with it the other end
                break
        before, _, self.seen = self.seen.partition(until) if until else (self.seen, "", "")
        return before

    def press(self, key):
        os.write(self.keyboard, key.encode())

    def wait(self):
        self.read()
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_one_key_is_a_choice_and_ctrl_c_keeps_all_choices(sft, tmp_path):
    """A key needs no Enter, and an arrow key is no choice."""
    termios = pytest.importorskip("termios")
    child = Terminal(lambda: label.main(config(sft, tmp_path)))
    for key in ("1", "\x1b[1~t", "T"):  # Home contains a 1 and comes as one piece
        child.read("q quit ")
        child.press(key)
        if len(key) > 1:
            time.sleep(0.3)
            assert child.seen == "" and not select.select([child.keyboard], [], [], 0)[0]  # no echo, no answer
            child.press("2")
    child.read("q quit ")
    assert not termios.tcgetattr(child.keyboard)[3] & (termios.ICANON | termios.ECHO)
    child.press("\x03")
    assert "has 2 of 5 pairs; ties: 1, skips: 0" in child.read()
    assert child.wait() == 130
    assert len(rows(tmp_path)) == 2 and [row["verdict"] for row in rows(tmp_path, "pairs.undecided.jsonl")] == ["tie"]


def test_the_terminal_is_restored_and_early_keys_are_no_answer(sft, tmp_path):
    termios = pytest.importorskip("termios")
    modes = []

    def body():
        modes.append(termios.tcgetattr(0))
        sample = label.two_answers

        def slow(*args):
            os.write(1, b"sampling\n")
            time.sleep(0.3)
            return sample(*args)
        label.two_answers = slow
        try:
            label.main(config(sft, tmp_path))
        finally:
            print("restored" if termios.tcgetattr(0) == modes[0] else "changed")
    child = Terminal(body)
    child.read("sampling")
    child.press("1")
    child.read("q quit ")
    child.press("q")
    screen = child.read()
    assert "restored" in screen and "better:" not in screen
    assert child.wait() == 0 and rows(tmp_path) == []


# ----------------------------------------------------------------------------------------------------------
# the reward model

def test_train_rm_reads_the_file_and_nothing_in_it_is_dropped(sft, tmp_path, monkeypatch, capsys):
    by_atlas(sft, tmp_path, n=40)
    keys(monkeypatch, "ts1")
    label.main(config(sft, tmp_path, n=41))
    capsys.readouterr()
    train_rm.train(train_rm.Config(data=str(tmp_path / "pairs.jsonl"), init_from=sft, out_dir=str(tmp_path / "rm"),
                                   device="cpu", max_iters=2, batch_size=4))
    screen = capsys.readouterr().out
    assert "train: 39 rows, held out: 2;" in screen and "dropped" not in screen


@pytest.mark.slow
def test_a_reward_model_learns_from_what_the_labeller_chose(tmp_path):
    sft = str(tmp_path / "sft.pt")  # one that tells kinds of answers apart
    train_sft.train(train_sft.Config(out_dir=str(tmp_path), device="cpu", max_iters=600, batch_size=64, n_embd=64))
    by_atlas(sft, tmp_path, n=1000)
    train_rm.train(train_rm.Config(data=str(tmp_path / "pairs.jsonl"), init_from=sft, device="cpu",
                                   out_dir=str(tmp_path / "rm"), max_iters=200))
    by_atlas(sft, tmp_path / "fresh", n=600, seed=1)
    split = data.load_comparisons(str(tmp_path / "fresh" / "pairs.jsonl"), atlas.tokenizer(), 256, skip_bad=False)
    reward_model, _ = stages.load_reward_model(train_ppo.Config(rm=str(tmp_path / "rm" / "rm.pt")),
                                                  tokenizer_id(atlas.tokenizer()), 256, "cpu")
    margins = train_rm.margins_of(reward_model, split.train + split.heldout, 64, atlas.tokenizer().eot_token, "cpu",
                                  nullcontext)
    # A coin's share among 600 has a standard error of 0.02; the labeller itself is not always of one mind.
    assert len(margins) > 500 and (margins > 0).float().mean() > 0.58
