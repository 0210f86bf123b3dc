"""
Label it yourself: shows two sampled answers to a prompt, takes 1, 2, t (tie), s (skip) or q (quit) with one key, and
appends the choice to a file of pairs that train_rm.py reads.

    python -m tools.label                            out/atlas/sft.pt answers atlas questions, you choose
    python -m tools.label --labeller=atlas --n=500   the built-in labeller chooses
    python -m tools.label --data=prompts.jsonl --init_from=out/hh/sft.pt --max_new_tokens=64
    python train_rm.py --data=out/atlas/pairs.jsonl --init_from=out/atlas/sft.pt

Every choice is on the disk before the next question is shown. End with q or Ctrl-C, or pull the plug: the same command
continues where it ended and asks nothing twice. Ties and skips are not pairs. They go to *.undecided.jsonl beside the
file, so that they are not asked again either.
"""

import hashlib
import itertools
import json
import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import numpy as np
import torch

import atlas
import data
from model import GPT, GPTConfig
from rollout import generate
from support.checkpoint import load_checkpoint
from support.device import generator, pick_device
from support.flags import Flags, check_domains, require, run_script
from tokenizer import DataError, decode, eos_ids, run_tokenizer

try:
    import termios
    import tty
except ImportError:  # Windows
    termios = None
    import msvcrt

CANDIDATES = 8  # answers sampled to find two that differ


@dataclass
class Config:
    data: str = "atlas"              # the prompts: atlas (built in), or a .jsonl / .jsonl.gz file
    out_dir: Optional[str] = None    # where sft.pt and pairs.jsonl are; default: out/<data>
    init_from: Optional[str] = None  # the SFT checkpoint that answers; default: out_dir/sft.pt
    pairs: Optional[str] = None      # the file that the choices are appended to; default: out_dir/pairs.jsonl
    labeller: str = "you"            # you|atlas: atlas is the built-in labeller, for --data=atlas
    n: int = 100                     # [1, inf) stop when the file has this many pairs
    max_new_tokens: int = 16         # [1, inf) longest answer; one that is cut there is not shown
    temperature: float = 1.0         # (0, inf) of the sampled answers; use the same as in PPO
    seed: int = 0                    # [0, 9e18] the same seed asks the same questions
    device: str = "auto"             # auto|cpu|cuda: auto takes cuda if there is one


# ---------------------------------------------------------------------------------------------------------------------
# the file

class Decisions:
    """The choices in a pairs file and in *.undecided.jsonl beside it, and what need not be asked again: `asked` has the
    texts, and `steps` the places in the order of questions."""

    def __init__(self, path):
        self.path, self.undecided = Path(path), Path(path).with_suffix(".undecided.jsonl")
        self.asked, self.steps, self.counts = set(), set(), {"pair": 0, "tie": 0, "skip": 0}
        for row in read_whole_lines(self.path, ("prompt", "chosen", "rejected")):
            self.note(row, "pair", row["chosen"], row["rejected"])
        for row in read_whole_lines(self.undecided, ("prompt", "verdict", "first", "second")):
            self.note(row, "tie" if row["verdict"] == "tie" else "skip", row["first"], row["second"])

    def note(self, row, verdict, *answers):
        self.asked.add((row["prompt"], frozenset(answers)))
        self.steps.add((row.get("source"), row.get("step")))
        self.counts[verdict] += 1

    def append(self, verdict, prompt, answers, **more):
        """verdict: 0 or 1 (the index of the better answer), "tie" or "skip". Writes one line in one write, on the disk
        when this returns. A crash leaves the whole line, or a part without its newline."""
        decided = verdict in (0, 1)
        row = {"prompt": prompt} | ({"chosen": answers[verdict], "rejected": answers[1 - verdict]} if decided else
                                    {"verdict": verdict, "first": answers[0], "second": answers[1]}) | more
        with open(self.path if decided else self.undecided, "ab", buffering=0) as file:
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            os.fsync(file.fileno())
        self.note(row, "pair" if decided else verdict, *answers)

    def report(self, n):
        print(f"{self.path} has {self.counts['pair']:,} of {n:,} pairs; ties: {self.counts['tie']:,}, skips: "
              f"{self.counts['skip']:,}")


def read_whole_lines(path, keys):
    """The rows of a file, [] if there is none. A last line that a crash left incomplete is cut off and printed. Its
    choice was not confirmed, so it is asked again. Raises UserError for a line that is not a row with the keys."""
    text = path.read_bytes() if path.exists() else b""
    lines, newline, rest = text.rpartition(b"\n")
    if rest and parse(rest, keys):  # a row that lacks only its newline, as an editor may leave it
        with open(path, "ab") as file:
            file.write(b"\n")
        lines, newline, rest = text, b"\n", b""
    rows = []
    for number, line in enumerate((lines + newline).splitlines(), 1):
        if line.strip():
            rows.append(parse(line, keys))
            require(rows[-1], f"{path}:{number} is not a row with {', '.join(keys)}: correct it, or give another "
                    "file with --pairs")
    if rest:
        begins_like_ours = rest.startswith(b'{"prompt": "'[:len(rest)])
        require(begins_like_ours, f"{path}:{len(rows) + 1} is not a row with {', '.join(keys)}: correct it, or "
                "give another file with --pairs")
        print(f"note: {path} ended in the middle of a line, which is cut off and will be asked again: "
              f"{rest.decode(errors='replace')}")
        os.truncate(path, len(text) - len(rest))
    return rows


def parse(line, keys):
    """The row of a line if it has the keys, each a text; else None."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and all(isinstance(row.get(key), str) for key in keys) else None


# ---------------------------------------------------------------------------------------------------------------------
# the question

def load(path, device):
    """(GPT in eval mode, its encoding, its sha256) from a checkpoint of train_sft.py."""
    saved = load_checkpoint(path, "sft")
    encoding, _ = run_tokenizer(None, None, saved["tokenizer"])
    model = GPT(GPTConfig(**saved["model_config"])).to(device).eval()
    model.load_state_dict(saved["model"], strict=True)
    return model, encoding, saved["sha256"]


def two_answers(model, encoding, prompt, config, rng):
    """Two different answers to a prompt (ids), in random order, or None if all of CANDIDATES samples that ended say the
    same. Cut answers are left out: the file would say that they end where they were cut."""
    device = model.value_head.linear.weight.device
    prompts, lens = (x.to(device) for x in data.collate_prompts([prompt] * CANDIDATES, encoding.eot_token))
    rollout = generate(model, prompts, lens, config.max_new_tokens, eos=eos_ids(encoding),
                       temperature=config.temperature, generator=rng)
    ends = (lens + rollout.response_lens).tolist()
    texts = [decode(encoding, row[len(prompt):end]) for row, end in zip(rollout.tokens.tolist(), ends)
             if row[end - 1] in eos_ids(encoding)]
    pair = list(dict.fromkeys(texts))[:2]
    # The first sample is more likely than the second to be the policy's usual answer, so the order is random.
    if torch.rand((), generator=rng, device=device) < 0.5:
        pair.reverse()
    return pair if len(pair) == 2 else None


def printable(text):
    """The text, safe for a terminal: a model can sample control characters, and they could do anything there."""
    return "".join("\n     " if c == "\n" else c if c.isprintable() else repr(c)[1:-1] for c in text)


@contextmanager
def keyboard():
    """Yields two functions. key() waits for a key, without Enter at a terminal; elsewhere it reads the first letter of
    a line, or q at the end. discard() drops what was typed so far. The terminal is restored, even after Ctrl-C."""
    if not sys.stdin.isatty():
        def key():
            line = sys.stdin.readline()
            return line.strip()[:1] if line else "q"
        yield key, lambda: None
    elif termios is None:
        def discard():
            while msvcrt.kbhit():
                msvcrt.getwch()
        yield msvcrt.getwch, discard
    else:
        terminal = sys.stdin.fileno()
        before = termios.tcgetattr(terminal)
        try:
            tty.setcbreak(terminal)
            # One read takes all that a key sends: an arrow key sends three characters, which are not an answer.
            yield (lambda: os.read(terminal, 32).decode(errors="replace"),
                   lambda: termios.tcflush(terminal, termios.TCIFLUSH))
        finally:
            termios.tcsetattr(terminal, termios.TCSADRAIN, before)


VERDICTS = {"1": 0, "2": 1, "t": "tie", "s": "skip", "q": None, "\x03": None, "\x04": None}  # Ctrl-C, Ctrl-D


def ask(prompt, answers, key, discard):
    """Shows a question and waits for one of its keys. Returns a value of VERDICTS, None to end."""
    discard()  # a key that was pressed before the question appeared does not answer it
    print(f"\n{printable(prompt)}\n\n  1  {printable(answers[0])}\n  2  {printable(answers[1])}\n")
    print("better: 1 or 2, t tie, s skip, q quit ", end="", flush=True)
    while True:
        pressed = key().lower()
        if pressed in VERDICTS:
            print(pressed if pressed.isprintable() else "q")
            return VERDICTS[pressed]


# ---------------------------------------------------------------------------------------------------------------------
# one question after the other

def main(config):
    check_domains(config)
    require(config.labeller == "you" or config.data == "atlas", "--labeller=atlas judges answers to atlas "
            "questions only: leave --data out, or label yourself")
    folder = Flags(data=config.data, out_dir=config.out_dir).folder
    path = Path(config.pairs or folder / "pairs.jsonl")
    require(path.suffix == ".jsonl", f"--pairs={path} must end in .jsonl")
    device = pick_device(config)
    model, encoding, sha256 = load(config.init_from or folder / "sft.pt", device)
    split = data.load_prompts(config.data, encoding, model.config.block_size, config.max_new_tokens)
    path.parent.mkdir(parents=True, exist_ok=True)
    decisions = Decisions(path)
    print(f"{config.data}: {'; '.join(split.report)}; held-out prompts are not asked")
    decisions.report(config.n)
    interrupted = False
    try:
        with keyboard() as (key, discard):
            label(model, encoding, split.train, config, decisions, sha256, key, discard)
    except KeyboardInterrupt:
        interrupted = True
        print()
    decisions.report(config.n)
    if interrupted:
        raise SystemExit(130)


def label(model, encoding, prompts, config, decisions, sha256, key, discard):
    """Asks until there are n pairs, or you quit, or no new question comes up."""
    # Everything that a step's question depends on: an answered step is recognised without sampling it again.
    made_by = repr((sha256, config.seed, config.max_new_tokens, config.temperature, prompts))
    source, device = hashlib.sha256(made_by.encode()).hexdigest()[:12], model.value_head.linear.weight.device
    order, in_vain = data.BatchOrder([1] * len(prompts), 1, config.seed), 0
    for step in itertools.count():
        if decisions.counts["pair"] >= config.n:
            return
        if in_vain >= 2 * len(prompts):
            print("two passes over the prompts brought no pair that was not asked before: raise --temperature, or "
                  "--max_new_tokens if answers are cut")
            return
        in_vain += 1
        if (source, step) in decisions.steps:
            in_vain = 0
            continue
        ids, rng = prompts[order.order(step)[0]], generator(device, config.seed, "label", step)
        prompt, answers = decode(encoding, ids), two_answers(model, encoding, ids, config, rng)
        if answers is None or (prompt, frozenset(answers)) in decisions.asked:
            continue
        in_vain = 0
        if config.labeller == "atlas":
            verdict = 0 if atlas.label(prompt, *answers, np.random.default_rng([config.seed, step])) else 1
        else:
            verdict = ask(prompt, answers, key, discard)
        if verdict is None:
            return
        decisions.append(verdict, prompt, answers, labeller=config.labeller, source=source, step=step)


if __name__ == "__main__":
    run_script(main, Config, __doc__, DataError)
