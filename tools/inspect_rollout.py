"""
What a PPO step sees, token by token: one HTML file that needs nothing but a browser, or tables on the terminal.

    python -m tools.inspect_rollout                                        out/atlas/ppo.pt -> out/atlas/inspect.html
    python -m tools.inspect_rollout --checkpoint=out/atlas/sft.pt --after=out/atlas/ppo.pt       before and after
    python -m tools.inspect_rollout --prompt="Where is Lima?" --response=" Lima is asleep."      a response of yours
    python -m tools.inspect_rollout --data=rows.jsonl --text               {"prompt"} or {"prompt", "response"} rows
    python -m tools.inspect_rollout --samples=out/atlas/samples.jsonl      what the run showed at its last look

A ppo.pt is shown as its next rollout would see it, with its own flags, critic and optimizer. An sft.pt is shown as
PPO's first rollout would see it: with the flags of the ppo.pt that you give with it, or else the defaults, and with the
reward model as the critic. Every number comes from the functions that train_ppo.py calls, and the ratio from
train_ppo.py itself, which takes its next optimizer steps in a temporary folder. No checkpoint is changed. A ppo.pt of
experiments.ladder --objective is shown with that objective's advantages.

The critic may be wrong, and at PPO's first rollout it is. So you also get the advantage as the derivation defines it,
without a critic. It compares what really follows, on average over answers continued from before and after the token.
"""

import io
import json
import math
import os
import sys
import tempfile
import textwrap
import unicodedata
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Callable, Optional

import torch

import data
from experience import Experience, load_reward_function, sides_with_rows
from experiments import rungs
from experiments.rungs import token_advantages
from model import upcast
from ppo import kl_estimate, masked_mean, reward_to_go, shape_rewards, zero_outside
from rollout import Rollout, cooled, generate, response_states
from support import metrics, stages
from support.checkpoint import atomic_write, load_checkpoint, save_checkpoint
from support.device import generator, setup
from support.flags import UserError, check_domains, require, run_script
from tokenizer import DataError, decode, encode_prompt, encode_response, eos_ids, run_tokenizer, token_bytes
from tools.plot import read_run

TEMPLATE = Path(__file__).with_suffix(".html")
MAX_ROWS = 64       # of --data, on one page
ALTERNATIVES = 5    # likeliest tokens listed at each position
SHANGHAI = "Where is Shanghai?", (" Shanghai is in China.", " Shanghai is delicious.")  # the derivation's own example

# What a token can be coloured by: the label, its heading on the terminal (None: only on the page), the number that has
# no colour, and what it is. The first ten have the keys 1 to 9 and 0 on the page.
QUANTITIES = {
    "whitened": ("advantage (whitened)", "adv", 0, "how much better than the critic expected, whitened as the policy's "
                                                   "own next rollout is: the token's weight in PPO's loss"),
    "advantage": ("advantage (raw)", None, 0, "before whitening, in units of score"),
    "sampled_advantage": ("advantage by sampling", "adv smp", 0,
                          "how much the token raises the reward that follows, on average over sampled completions: "
                          "no critic"),
    "value": ("value", "value", 0, "what the critic expects to follow, before the token is chosen, in units of score"),
    "kl": ("KL", "KL", 0, "log pi - log pi_ref of the token, in nats; it estimates the KL only where this policy "
                          "sampled the response"),
    "reward": ("reward", "reward", 0, "-kl_coef * KL, and the score on the last token"),
    "logprob": ("log-prob", "logp", 0, "log pi of the token under this policy"),
    "ref_logprob": ("reference log-prob", "ref logp", 0, "log pi_ref of the token under the SFT policy"),
    "ratio": ("ratio", "ratio", 1, "probability after PPO's next optimizer steps / probability now"),
    "entropy": ("entropy", "entropy", 0, "of the distribution that the token was chosen from, in nats"),
    "reward_to_go": ("reward-to-go", None, 0, "this reward and all later ones, discounted by gamma"),
    "sampled_value": ("value by sampling", None, 0, "what follows on average when the response is continued from "
                                                    "before the token: what the critic should say"),
    "change": ("p after / p before", "p2 / p1", 1, "probability under the second checkpoint / under the first"),
}
ONE_SIDED = {"logprob": "below", "ref_logprob": "below", "entropy": "above"}  # never on the other side of 0: unsigned
COLUMNS = 120       # of the terminal


@dataclass
class Config:
    checkpoint: str = "out/atlas/ppo.pt"  # an sft.pt or ppo.pt
    after: Optional[str] = None   # a second one, to compare with the first
    init_from: Optional[str] = None  # the SFT checkpoint that is the reference; default: as in the run, or beside it
    rm: Optional[str] = None      # the reward model's checkpoint; default: as in the run, or rm.pt beside it
    prompt: Optional[str] = None  # show an answer to this; default: some held-out prompts of the run
    response: Optional[str] = None  # instead of sampling an answer to --prompt, show this one
    data: Optional[str] = None    # a .jsonl file of prompts, with or without responses, to show
    samples: Optional[str] = None  # a run's samples.jsonl: show the answers of its last look
    n: int = 1                    # [1, inf) answers sampled for each prompt and checkpoint
    updates: int = 1              # [0, inf) rollouts of PPO until the ratio is taken; 0 is quicker and shows no ratio
    completions: int = 64         # [0, inf) answers continued from each token, for the advantage without a critic
    save: Optional[str] = None    # the file to write; default: inspect.html beside the checkpoint
    overwrite: bool = False       # replace that file even if this tool did not write it
    text: bool = False            # print tables, in colour on a terminal, and write no file
    seed: int = 0                 # [0, 9e18] seed of the answers that are shown
    device: str = "auto"          # auto|cpu|cuda: auto takes cuda if there is one


# ---------------------------------------------------------------------------------------------------------------------
# what a rollout starts from

@dataclass
class Side:
    """A checkpoint, and everything that train_ppo.py would use for its next rollout."""
    name: str
    saved: dict                    # the checkpoint
    config: rungs.Config           # resolved
    split: data.Split              # the prompts of the run
    models: stages.Models          # critic None: the values are those of the policy's own head
    experience: Experience
    reward_fn: Callable            # (rollout, texts) -> scores (B,)

    @property
    def encoding(self):
        return self.experience.encoding

    @property
    def policy(self):
        return self.models.policy

    @property
    def iterations(self):
        """The number of rollouts that trained this policy."""
        return self.saved["iter"] if self.saved["stage"] == "ppo" else 0

    @property
    def kl_coef(self):
        return self.saved.get("kl_coef", self.config.kl_coef)


def load_sides(options):
    """[Side] of --checkpoint and, if given, of --after. Raises UserError or DataError for what does not fit."""
    paths = [path for path in (options.checkpoint, options.after) if path]
    saved = [load_checkpoint(path, "sft", "ppo") for path in paths]
    require(len({checkpoint["tokenizer"]["sha256"] for checkpoint in saved}) == 1, f"{options.checkpoint} and "
            f"{options.after} have different tokenizers: compare checkpoints of one run")
    flags = next((checkpoint["flags"] for checkpoint in saved if checkpoint["stage"] == "ppo"), None)
    require(flags or not options.init_from, "--init_from names the reference of a ppo.pt: an sft.pt is its own")
    names = [Path(path).name for path in paths]
    names = paths if len(set(names)) < len(names) else names
    return [load_side(path, name, checkpoint, flags, options) for path, name, checkpoint in zip(paths, names, saved)]


def load_side(path, name, saved, flags, options):
    """The Side of one checkpoint. An SFT policy takes PPO's `flags` from the other checkpoint, or else the defaults."""
    folder, is_ppo = Path(path).parent, saved["stage"] == "ppo"
    inherited = {flag: saved["flags"][flag] for flag in ("data", "tokenizer", "seed", "skip_bad")}
    flags = saved["flags"] if is_ppo else flags or asdict(rungs.Config(**inherited))
    reference = (options.init_from or flags["init_from"] or str(folder / "sft.pt")) if is_ppo else path
    rm = (options.rm or flags["rm"] or str(folder / "rm.pt")) if flags["reward"] == "rm" else None
    known = {field.name for field in fields(rungs.Config)}
    config = rungs.Config(**{name: value for name, value in flags.items() if name in known and value is not None} | {
        "eval": None, "init_from": reference, "rm": rm, "device": options.device, "compile": False, "resume": False,
        "overwrite": False})
    config.check()
    config = config.resolved()
    require(config.advantage == "gae", f"{path} was trained with --advantage=group, where the advantage is one "
            "number per response, compared with others to its prompt: there is nothing to see by token")
    encoding, tokenizer = run_tokenizer(None, None, saved["tokenizer"])
    block_size = saved["model_config"]["block_size"]
    stages.resolve_max_new_tokens(config, encoding, block_size)
    device, autocast = setup(config)
    models = stages.load_models(config, tokenizer, device, autocast)
    for flag, source in (("init_from", "sft"), ("rm", "rm")):
        require(not is_ppo or saved["sources"][source] == models.sources[source], f"{path} was not trained with "
                f"{getattr(config, flag)}: name the file that it was trained with by --{flag}")
    if is_ppo:
        models.policy = stages.load_policy(saved, device)
        if models.critic:
            models.critic = stages.load_policy(saved | {"model": saved["critic"]}, device)
    function = load_reward_function(config.reward)
    rows_for = sides_with_rows(function, None)
    split = data.load_prompts(config.data, encoding, block_size, config.max_new_tokens, config.skip_bad, rows_for)
    experience = Experience(config, encoding, device, autocast, *stages.rows_per_pass(config, models, split, device))
    reward_fn = experience.reward_fn(function or models.reward_model)
    return Side(name, saved, config, split, models, experience, reward_fn)


def sample(side, prompts, *purpose):
    """[(prompt, response)]: one answer (a list of ids) of the side's policy to each of the Prompts."""
    rollout = side.experience.sample(side.policy, prompts, generator(side.experience.device, *purpose))
    return [(prompt, response) for prompt, (_, response) in zip(prompts, rollout.ids())]


def next_rollout(side):
    """[(prompt, response)] of the rollout that train_ppo.py would sample next, equal in every token."""
    iteration, config = side.iterations + 1, side.config
    order = data.BatchOrder([1] * len(side.split.train), config.batch_size // config.samples_per_prompt, config.seed)
    prompts = [side.split.train[i] for i in order.order(iteration - 1) for _ in range(config.samples_per_prompt)]
    return sample(side, prompts, config.seed, "rollout", iteration)


def updated_policy(side, rollouts):
    """(the policy after train_ppo.py continued from here for some rollouts, the number of optimizer steps it took)."""
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        resume = side.saved["stage"] == "ppo"
        config = replace(side.config, out_dir=folder, max_iters=side.iterations + rollouts, resume=resume)
        path = Path(folder) / "ppo.pt"
        if resume:  # with this machine's paths in its flags, or it would be refused as another run
            save_checkpoint(path, {k: v for k, v in side.saved.items() if k != "sha256"} | {"flags": asdict(config)})
        rungs.train(config)
        steps = int(read_run(folder)["optimizer_steps"][1].sum())
        return stages.load_policy(load_checkpoint(path, "ppo"), side.experience.device), steps


# ---------------------------------------------------------------------------------------------------------------------
# the numbers

def rollout_of(side, rows):
    """(a Rollout of the rows [(Prompt, response)], given as ids, and the forward passes over it)."""
    batch = data.collate_demonstrations([data.Demonstration(*row) for row in rows], side.experience.pad)
    tokens, prompt_lens, response_lens, mask = (x.to(side.experience.device) for x in batch)
    unsampled = torch.zeros(mask.shape, device=mask.device)
    rollout = Rollout(tokens, prompt_lens, response_lens, mask, logprobs=unsampled, values=unsampled)
    return rollout, side.experience.minibatch_passes(rollout)


@torch.no_grad()
def shaped(side, rows, rollout, passes):
    """The first half of train_ppo.loop for any rows, as rollout_of gives them: a dict with "tokens" (B, T),
    "prompt_lens", "scores", "has_eos", each (B,), and the rest (B, R)."""
    config, experience, models, mask = side.config, side.experience, side.models, rollout.mask
    texts = [(decode(side.encoding, prompt), decode(side.encoding, response), prompt.row) for prompt, response in rows]
    (scores, _), has_eos = side.reward_fn(rollout, texts), rollout.has_eos(experience.eos)
    logprobs, values, entropy = experience.recompute(side.policy, rollout, passes, entropy=True)
    ref_logprobs, _ = experience.recompute(models.reference, rollout, passes)
    if models.critic:
        values = experience.recompute_values(models.critic, rollout, passes)
    rewards = shape_rewards(scores - config.eos_penalty * ~has_eos, logprobs, ref_logprobs, mask,
                            side.kl_coef if config.kl_in == "reward" else 0.0)
    return {
        "tokens": rollout.tokens, "prompt_lens": rollout.prompt_lens, "mask": mask, "scores": scores,
        "has_eos": has_eos, "logprob": logprobs, "value": values, "entropy": entropy,
        "ref_logprob": ref_logprobs, "kl": kl_estimate(logprobs, ref_logprobs), "reward": rewards,
        "reward_to_go": reward_to_go(rewards, mask, config.gamma)}


@torch.no_grad()
def measure(side, rows, batch, updated=None, before=None, after=None):
    """The dict of `shaped` for `rows`, followed by those of `batch`, the policy's next rollout. It also has "advantage"
    and "whitened" (by the statistics of the batch alone), (B, R); "kl_sum" (B,); "top_probs" and "top_ids"
    (B, R, ALTERNATIVES); with the policy `updated`, the "ratio" (B, R); with the policies `before` and `after`, the
    "change" of `rows` alone, which is the same for both sides."""
    rollout, passes = rollout_of(side, rows + batch)
    numbers = shaped(side, rows + batch, rollout, passes)
    mask, config, experience = rollout.mask, side.config, side.experience
    numbers["advantage"], _ = token_advantages(config.objective, numbers["reward"], numbers["value"], mask,
                                               config.gamma, config.lam)
    # ppo.whiten with the mean and variance of the batch. With those of all rows, numbers would depend on what is shown.
    batch_advantages, batch_mask = numbers["advantage"][len(rows):], mask[len(rows):]
    mean = masked_mean(batch_advantages, batch_mask)
    variance = masked_mean((batch_advantages - mean) ** 2, batch_mask)
    numbers["whitened"] = zero_outside((numbers["advantage"] - mean) * torch.rsqrt(variance + 1e-8), mask)
    numbers["kl_sum"] = (numbers["kl"] * mask).sum(1)
    likeliest = experience.autocast()(partial(alternatives, side.policy, temperature=config.temperature))
    numbers["top_probs"], numbers["top_ids"] = experience.in_passes(likeliest, rollout, passes)
    if updated:
        numbers["ratio"] = (experience.recompute(updated, rollout, passes)[0] - numbers["logprob"]).exp()
    if after:
        logprobs, later_logprobs = (experience.recompute(policy, *rollout_of(side, rows))[0]
                                    for policy in (before, after))
        numbers["change"] = (later_logprobs - logprobs).exp()
    return numbers


def sampled_values(side, rows, completions, seed):
    """{(prompt, beginning of a response): (value, standard error)} for each beginning of each row. The value is the
    mean reward-to-go of responses that the policy completes from there, which is what a critic should learn."""
    found = {}
    states = {(tuple(prompt), tuple(response[:t])): prompt for prompt, response in rows for t in range(len(response))}
    for (prompt, begun), given in states.items():  # responses to one prompt share their first states
        t, policy, config = len(begun), side.policy, side.config
        tokens, lens = data.collate_prompts([list(prompt + begun)] * completions, side.encoding.eot_token)
        device = side.experience.device
        with side.experience.autocast():
            rollout = generate(policy, tokens.to(device), lens.to(device), max(1, config.max_new_tokens - t),
                               eos=side.experience.eos, temperature=config.temperature,
                               generator=generator(device, seed, "completions", prompt, begun))
        completed = [(given, list(begun) + end) for _, end in rollout.ids()]
        to_go = shaped(side, completed, *rollout_of(side, completed))["reward_to_go"][:, t]
        found[prompt, begun] = to_go.mean().item(), (to_go.std(unbiased=False) / math.sqrt(completions)).item()
    return found


def alternatives(policy, tokens, prompt_lens, R, temperature):
    """Probabilities and ids, each (B, R, ALTERNATIVES), of the likeliest tokens at the states of score_response."""
    hidden, _ = response_states(policy, tokens, prompt_lens, R)
    probabilities = torch.softmax(upcast(policy.policy_head(cooled(hidden, temperature))), dim=-1)
    return probabilities.topk(min(ALTERNATIVES, probabilities.size(-1)))


# ---------------------------------------------------------------------------------------------------------------------
# what to show

def asked_rows(options, sides):
    """[(prompt, responses)], lists of ids: what the flags ask for. Without responses, some will be sampled."""
    require(options.response is None or options.prompt is not None, "--response answers a --prompt: give both")
    given = [name for name in ("prompt", "data", "samples") if getattr(options, name) is not None]
    require(len(given) < 2, f"--{' and --'.join(given)} both say what to show: give one")
    if options.samples:
        return encode_samples(sides, options.samples)
    if options.data:
        rows, _ = data.read_rows(options.data, convert=lambda row: data.to_row(row, 0)._replace(source=row))
        if len(rows) > MAX_ROWS:
            print(f"note: {options.data} has {len(rows):,} rows, and the first {MAX_ROWS} are shown")
        rows = rows[:MAX_ROWS]
    elif options.prompt is not None:
        row = {"prompt": options.prompt} | ({} if options.response is None else {"response": options.response})
        try:
            rows = [data.to_row(row, 0)]
        except data.BadRow as error:
            raise UserError(f"the flag {error}: give plain text") from None
    else:
        asked = [(prompt, []) for prompt in sides[0].split.examples(4)]
        rows = [data.Row(*SHANGHAI)] if sides[0].config.data == "atlas" else []
        return encode(sides, rows) + asked
    return encode(sides, rows)


def encode_samples(sides, path):
    """[(prompt, [response])], lists of ids, of the last look in a samples.jsonl. A response that was cut has no EOS.
    The ids come from encoding the text, and the policy may have sampled others for it."""
    samples = metrics.whole_lines(Path(path), "iter")
    require(samples, f"--samples={path} has no samples: name the samples.jsonl of a PPO run")
    samples = [sample for sample in samples if sample["iter"] == samples[-1]["iter"]]
    asked = encode(sides, [data.Row(sample["prompt"], (sample["response"],)) for sample in samples])
    return [(prompt, [response if sample["ended"] else response[:-1]])
            for sample, (prompt, (response,)) in zip(samples, asked)]


def encode(sides, rows):
    """[(Prompt, responses)] as ids, from [Row]. A reward function that takes rows gets the file's row, or else the one
    that the run has for this prompt. Raises UserError for a row that a model cannot read."""
    asked, encoding, split = [], sides[0].encoding, sides[0].split
    rows_of_run = {tuple(prompt): prompt.row for prompt in split.train + split.heldout}
    block_size = min(side.policy.config.block_size for side in sides)
    longest = max(side.config.max_new_tokens for side in sides)
    for row in rows:
        require(not row.problem, f"{row.problem} in the row that begins {row.prompt[:60]!r}: take it out")
        prompt = encode_prompt(encoding, row.prompt)
        responses = [encode_response(encoding, response) for response in row.responses]
        length = len(prompt) + max([longest, *map(len, responses)])
        require(length <= block_size, f"the prompt {row.prompt[:60]!r} and a response to it may have {length} "
                f"tokens, but the model reads block_size={block_size}: shorten them")
        source = row.source or rows_of_run.get(tuple(prompt)) or {"prompt": row.prompt}
        asked.append((data.Prompt(prompt, source), responses))
    return asked


def shown_rows(options, sides):
    """[(prompt, response)] to show, and [where each response is from]: the answers given, and sampled ones."""
    asked = asked_rows(options, sides)
    prompts = [prompt for prompt, responses in asked if not responses for _ in range(options.n)]
    answers = [iter(sample(side, prompts, options.seed, "inspect") if prompts else [])
               for side in sides]
    rows, origins = [], []
    for prompt, responses in asked:
        rows += [(prompt, response) for response in responses]
        origins += ["given"] * len(responses)
        if not responses:
            for side, sampled in zip(sides, answers):
                rows += [next(sampled) for _ in range(options.n)]
                origins += [sampled_from(side)] * options.n
    return rows, origins


def sampled_from(side):
    return f"sampled from {side.name}"


INVISIBLE = {"\n": "↵", "\t": "⇥", "\r": "␍", " ": "·"}


def visible(raw):
    """[(text, whether it replaces something invisible)] of a token's bytes. Invisible are blanks, control and format
    characters, lone accents, and bytes that are not a whole UTF-8 character."""
    pieces = []
    for character in raw.decode("utf-8", errors="surrogateescape"):
        if character in INVISIBLE:
            piece = INVISIBLE[character], True
        elif "\udc80" <= character <= "\udcff":
            piece = f"<{ord(character) - 0xdc00:02X}>", True
        elif unicodedata.category(character)[0] in "CZ":
            piece = f"<U+{ord(character):04X}>", True
        elif unicodedata.combining(character) and not (pieces and not pieces[-1][1]):
            piece = "◌" + character, True
        else:
            piece = character, False
        if pieces and pieces[-1][1] == piece[1]:
            pieces[-1] = pieces[-1][0] + piece[0], piece[1]
        else:
            pieces.append(piece)
    return pieces


def describe_token(encoding, token):
    """What is shown of a token: its id, its visible pieces, and the words that a screen reader says."""
    if token in eos_ids(encoding):
        return {"id": token, "show": [("EOS", True)], "say": "end of text"}
    raw = token_bytes(encoding, token)
    text = raw.decode("utf-8", errors="replace")
    spoken = text.strip() if text.strip() and text.isprintable() else \
        " ".join(unicodedata.name(character, f"character {ord(character)}").lower() for character in text)
    return {"id": token, "show": visible(raw), "say": spoken}


def digits(x):
    """A number for JSON, with no more digits than a page shows; None where it is not finite."""
    return None if metrics.clean(x) is None else float(f"{x:.6g}")


def describe_response(side, numbers, i, prompt, response, origin):
    """Everything about row i of the numbers (lists), ready for JSON."""
    tokens = []
    for t, token in enumerate(response):
        top = zip(numbers["top_ids"][i][t], numbers["top_probs"][i][t])
        tokens.append(describe_token(side.encoding, token) | {"position": len(prompt) + t} |
                      {name: digits(numbers[name][i][t]) for name in QUANTITIES if name in numbers} |
                      {"top": [describe_token(side.encoding, other) | {"p": digits(p)} for other, p in top]})
    return {"origin": origin, "prompt": [describe_token(side.encoding, token) for token in prompt], "tokens": tokens,
            "score": digits(numbers["scores"][i]), "kl": digits(numbers["kl_sum"][i]), "ended": numbers["has_eos"][i],
            "kl_label": "KL" if origin == sampled_from(side) else "log pi/pi_ref"}  # not an estimate of the side's KL


def look(side, rows, origins, options, policies):
    """The view of one side, ready for JSON: its name, notes in words, and its responses."""
    batch = next_rollout(side)
    updated, steps = updated_policy(side, options.updates) if options.updates else (None, 0)
    numbers = {name: x.tolist() for name, x in measure(side, rows, batch, updated, *policies).items()}
    error = 0.0
    if options.completions:
        found = sampled_values(side, rows, options.completions, options.seed)
        error = sum(e for _, e in found.values()) / len(found)
        # 0 after the end, as in GAE
        values = [[found[tuple(prompt), tuple(response[:t])][0] for t in range(len(response))] + [0.0]
                  for prompt, response in rows]
        numbers["sampled_value"] = values
        numbers["sampled_advantage"] = [[r + side.config.gamma * after - before for r, before, after in
                                         zip(rewards, row, row[1:])] for rewards, row in zip(numbers["reward"], values)]
    n_tokens = sum(map(sum, numbers["mask"][len(rows):]))
    responses = [describe_response(side, numbers, i, *row, origin)
                 for i, (row, origin) in enumerate(zip(rows, origins))]
    return {"name": side.name, "notes": notes(side, n_tokens, len(batch), steps, options, error),
            "responses": responses, "limits": colour_limits(responses)}


def colour_limits(responses):
    """{quantity: the distance from its neutral number that has full colour}: one number in ten is at least as far. If
    an outlier set the scale, all others would be pale."""
    limits = {}
    for name, (_, _, neutral, _) in QUANTITIES.items():
        found = [token[name] for response in responses for token in response["tokens"] if token.get(name) is not None]
        distances = sorted(abs(distance(x, neutral)) for x in found) or [0]
        limits[name] = float(f"{max(0.01, distances[int(0.9 * len(distances))]):.2g}")
    return limits


def notes(side, n_tokens, n_batch, steps, options, error):
    """Sentences that say where the numbers of a view are from."""
    config, penalty = side.config, "" if side.config.kl_in == "loss" else f" - {side.kl_coef:.3g} * KL"
    found = [f"The policy is {side.name}, " + (
        f"after {side.iterations} rollout{'s' if side.iterations > 1 else ''} of PPO." if side.iterations else
        "as PPO's first rollout sees it. It is its own reference, so the KL is 0.")]
    if side.models.critic is None:
        found.append("The values are those of the policy's own head.")
    elif side.iterations:
        found.append("The values are those of the run's critic.")
    elif side.models.reward_model:
        found.append("The critic starts as the reward model: its value is the score of the response if it ended before "
                     "the token. That is not an expectation yet, so the first rollout's advantages may mislead.")
    else:
        found.append("The critic has not been trained yet, so the values are 0.")
    found.append(f"The rewards add up to score{penalty}"
                 + (f", less {config.eos_penalty:g} without EOS" if config.eos_penalty else "")
                 + f". The advantages are those of --objective={config.objective} with gamma {config.gamma:g}"
                 + (f" and lambda {config.lam:g}" if config.objective in rungs.OBJECTIVES[3:] else "")
                 + f", whitened by the mean and deviation of the policy's own next rollout ({n_batch} responses, "
                   f"{n_tokens:,} tokens), regardless of what is shown."
                 + (f" --objective={config.objective} uses the raw ones." if config.objective in rungs.NO_CRITIC
                    else ""))
    if steps:
        found.append(f"The ratio is taken after {steps} optimizer steps of train_ppo.py on the next "
                     + ("rollout" if options.updates == 1 else f"{options.updates} rollouts")
                     + ". The responses shown here are not in it: their ratios change with the policy.")
    if options.completions:
        found.append(f"Value and advantage by sampling are from {options.completions} completions of each beginning; "
                     f"the standard error of such a value is {error:.2f} on average.")
    return found


def inspect(options):
    """What the page and the terminal show, ready for JSON: {"quantities": [...], "views": [...]}."""
    sides = load_sides(options)
    rows, origins = shown_rows(options, sides)
    policies = [side.policy for side in sides] if options.after else []
    views = [look(side, rows, origins, options, policies) for side in sides]
    present = {name for view in views for response in view["responses"] for token in response["tokens"]
               for name in QUANTITIES if token.get(name) is not None}
    quantities = [{"name": name, "label": label, "short": short, "neutral": neutral, "about": about,
                   "side": ONE_SIDED.get(name, "both")}
                  for name, (label, short, neutral, about) in QUANTITIES.items() if name in present]
    return {"quantities": quantities, "views": views}


def distance(x, neutral):
    """How far a number is from the one that has no colour. Ratios, around 1, are compared by their logarithm."""
    return math.log(max(x, 1e-6)) if neutral else x


# ---------------------------------------------------------------------------------------------------------------------
# the page, and the terminal

def write_page(path, contents):
    """Writes the page. No text that a model may emit can end its script element, because the data contain no `<`."""
    text = json.dumps(contents).replace("<", "\\u003c")
    with atomic_write(path) as file:
        file.write(TEMPLATE.read_text(encoding="utf-8").replace("DATA", text, 1).encode())
    print(f"wrote {path}: open it in a browser")


def written_by_this_tool(path):
    head = TEMPLATE.read_bytes().splitlines()[:2]
    return path.is_file() and path.read_bytes().splitlines()[:2] == head


def plain(*tokens):
    return "".join(text for token in tokens for text, _ in token["show"])


def number(x, quantity=None):
    """Two decimals, with a sign if 0 has no colour and both signs can occur; a dash if the number is not finite."""
    sign = "+" if quantity and not quantity["neutral"] and quantity["side"] == "both" else ""
    if x is None:
        return "-"
    return f"{round(x, 2) + 0.0:{sign}.2f}" if abs(x) < 1000 else f"{x:{sign}.0e}"  # + 0.0 turns -0.0 into 0.0


def paint(text, x, quantity, limit):
    """Black text on blue if x is above the number without colour, on orange if it is below. Darker means farther."""
    strength = 0.0 if x is None else max(-1.0, min(1.0, distance(x, quantity["neutral"]) / limit))
    shades = (153, 111, 75) if strength > 0 else (223, 215, 208)  # of the 256 colours of a terminal
    if abs(strength) <= 0.02:
        return text
    return f"\x1b[38;5;16;48;5;{shades[math.ceil(abs(strength) * 3) - 1]}m{text}\x1b[0m"


def text_view(view, quantities, colour):
    """Lines of a view, of at most COLUMNS characters: for each response a table with two lines for each token."""
    quantities = [q for q in quantities if q["short"]]
    room = COLUMNS - 9 * len(quantities)
    yield f"== {view['name']}"
    yield from (line for note in view["notes"] for line in textwrap.wrap(note, COLUMNS))
    for response in view["responses"]:
        tokens = response["tokens"]
        width = min(room, max(len(plain(token)) for token in [*tokens, {"show": [("token", False)]}]))
        yield ""
        yield from textwrap.wrap(f"{plain(*response['prompt'])}   ({response['origin']})", COLUMNS)
        yield (f"score {number(response['score'])}, {response['kl_label']} {number(response['kl'])} nats, "
               f"{len(tokens)} tokens, " + ("ended by EOS" if response["ended"] else "cut: no EOS"))
        yield "token".ljust(width) + "".join(q["short"].rjust(9) for q in quantities)
        for token in tokens:
            cells = [(number(token[q["name"]], q).rjust(8), token[q["name"]], q, view["limits"][q["name"]])
                     for q in quantities]
            yield (cropped(plain(token), width).ljust(width)
                   + "".join(" " + (paint(*cell) if colour else cell[0]) for cell in cells))
            likeliest = ", ".join(f"{plain(other)} {other['p']:.2f}" for other in token["top"])
            yield cropped(f"    likeliest: {likeliest}", COLUMNS)
    yield ""


def cropped(text, width):
    return text if len(text) <= width else text[:width - 1] + "…"


def main(options):
    check_domains(options)
    path = Path(options.save or Path(options.checkpoint).parent / "inspect.html")
    require(options.text or options.overwrite or not path.exists() or written_by_this_tool(path),
            f"{path} is there and was not written by this tool: give another --save, or --overwrite")
    contents = inspect(options)
    if not options.text:
        return write_page(path, contents)
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for view in contents["views"]:
        print("\n".join(text_view(view, contents["quantities"], colour)))


if __name__ == "__main__":
    run_script(main, Config, __doc__, DataError)
