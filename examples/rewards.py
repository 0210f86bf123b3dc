"""
Reward functions to copy and change, for --reward and --eval of train_ppo.py.

    python train_ppo.py --data=sums.jsonl --reward=examples/rewards.py:graded --eval=examples/rewards.py:exact

A function gets lists of equal length: prompts, responses and, if it takes three, rows, the dicts of the data file. In
sums.jsonl a row is {"prompt": "12 + 30 = ", "answer": "42"}. It returns a number for each response, or {part: such
numbers}, whose sum is the score. Every call gets the same dicts, so do not change them.
"""

import re

LENGTH = 200  # characters


def exact(prompts, responses, rows):
    """1 where the response is the row's answer, ignoring blanks around it; else 0."""
    return [float(response.strip() == str(row["answer"]).strip()) for response, row in zip(responses, rows)]


def last_number(prompts, responses, rows):
    """1 where the last number of the response is the last number of the row's answer, as in GSM8K; else 0."""
    def number(text):
        found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
        return float(found[-1].replace(",", "")) if found else None

    return [float(number(response) is not None and number(response) == number(str(row["answer"])))
            for response, row in zip(responses, rows)]


def length_ramp(prompts, responses):
    """Rises from 0 for an empty response to 1 at LENGTH characters, and falls again to 0 at twice as many."""
    return [max(0.0, 1 - abs(len(response) - LENGTH) / LENGTH) for response in responses]


def graded(prompts, responses, rows):
    """A little for a response that is one number and nothing else, and the rest for the right one. A reward in steps
    gives a policy something to learn before it is ever right."""
    return {"format": [0.2 * bool(re.fullmatch(r"\s*-?\d+\s*", response)) for response in responses],
            "correct": [0.8 * right for right in exact(prompts, responses, rows)]}
