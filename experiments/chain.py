"""
A task with longer answers than atlas: count up or down from a digit, 18 steps in 36 tokens.

    python -m experiments.chain --to=out/chain.jsonl
    python train_sft.py --data=out/chain.jsonl --tokenizer=bytes --max_iters=400 --batch_size=48 --lr=2e-3 \\
        --block_size=48
    python train_ppo.py --data=out/chain.jsonl --tokenizer=bytes --reward=experiments/chain.py:right_steps \\
        --eval=experiments/chain.py:all_right --max_new_tokens=38 --batch_size=128 --kl_coef=0.01 --max_iters=80

A prompt is a letter that means nothing, the first digit, and the direction: "k7+=". The right answer is "7>8>9>0>1" and
so on. In the demonstrations a step goes wrong with probability 0.1, in every fourth row 0.3, and the next steps count
on from the wrong digit. The reward is the share of right steps. It comes at the end, so the critic has to find out
which step lost it.
"""

import json
import random
import string
from dataclasses import dataclass
from pathlib import Path

from support.checkpoint import atomic_write
from support.flags import check_domains, run_script

STEPS = 18


@dataclass
class Config:
    to: str = "out/chain.jsonl"  # the file to write: 6,240 demonstrations of 520 prompts


def answer(first, step, wrong, rng):
    digits = [first]
    while len(digits) < STEPS:
        digits.append(rng.randrange(10) if rng.random() < wrong else (digits[-1] + step) % 10)
    return ">".join(map(str, digits))


def demonstrations(rng):
    rows = [{"prompt": f"{letter}{first}{sign}=", "response": answer(first, step, 0.1 if i % 4 else 0.3, rng)}
            for i in range(12) for letter in string.ascii_lowercase for first in range(10)
            for sign, step in (("+", 1), ("-", 9))]
    rng.shuffle(rows)
    return rows


def n_right(prompt, response):
    """How many of the STEPS digits follow from the one before, the first from the prompt; 0 for another format."""
    digits, step = response.split(">"), 1 if prompt[2] == "+" else 9
    if len(digits) != STEPS or not all(len(digit) == 1 and digit in string.digits for digit in digits):
        return 0
    return int(digits[0] == prompt[1]) + sum((int(a) + step) % 10 == int(b) for a, b in zip(digits, digits[1:]))


def right_steps(prompts, responses):
    """The reward: the share of right steps."""
    return [n_right(*row) / STEPS for row in zip(prompts, responses)]


def all_right(prompts, responses):
    """The evaluation: 1 for an answer without a mistake."""
    return [float(n_right(*row) == STEPS) for row in zip(prompts, responses)]


def main(config):
    check_domains(config)
    Path(config.to).parent.mkdir(parents=True, exist_ok=True)
    rows = demonstrations(random.Random(0))
    with atomic_write(Path(config.to)) as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
    print(f"wrote {config.to}: {len(rows):,} demonstrations")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
