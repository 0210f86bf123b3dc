"""
Making experience: prompts -> sampled responses -> scores -> recomputed log-probs and values, on all processes.

Shapes: B responses of at most R tokens, T = prompt + response. Under torchrun every process samples, scores and
recomputes its shard of the rows, and every process gets the results for all B. In one process there is one shard.
"""

import importlib.util
import math
from functools import partial
from itertools import chain
from numbers import Real
from pathlib import Path

import torch

from data import collate_prompts, length_buckets
from rollout import generate, score_response, score_values
from support import distributed
from support.device import generator, maybe_compile
from support.flags import require
from tokenizer import decode


class Experience:
    """Sampling and scoring at one run's settings: its encoding, device, precision, temperature, rows per pass.

    score_response and score_values are rollout.py's, at the run's temperature and precision and compiled if it asks for
    that. The update calls the same two, so that it computes what `recompute` computed."""

    def __init__(self, config, encoding, device, autocast, micro_batch_size):
        self.config, self.encoding, self.device, self.autocast = config, encoding, device, autocast
        self.eos, self.micro_batch_size = encoding.eot_token, micro_batch_size
        self.score_response = autocast()(maybe_compile(partial(score_response, temperature=config.temperature),
                                                       config.compile))
        self.score_values = autocast()(maybe_compile(score_values, config.compile))

    # -- sampling

    def rng(self, purpose, *more):
        """A generator for one purpose, another one in each process."""
        return generator(self.device, self.config.seed, distributed.per_rank(purpose), *more)

    def sample(self, policy, prompts, rng):
        """Rollout of the policy on prompts, lists of ids. All processes must get as many (distributed.fill_up)."""
        tokens, prompt_lens = (x.to(self.device) for x in collate_prompts(distributed.shard(prompts), self.eos))
        with self.autocast(), distributed.unsharded(policy):
            rollout = generate(policy, tokens, prompt_lens, self.config.max_new_tokens, eos=self.eos,
                               temperature=self.config.temperature, generator=rng)
        return distributed.gather(rollout, tokens=self.eos)

    def collect(self, policy, prompts, rng):
        """Rollout of the policy on prompts, and its texts [(prompt, response)]."""
        rollout = self.sample(policy, prompts, rng)
        return rollout, [tuple(decode(self.encoding, ids) for ids in row) for row in rollout.ids()]

    # -- scores

    @torch.no_grad()
    def score_by_model(self, reward_model, rollout, texts):
        """Scores (B,) of a reward model, of texts that all end with EOS. Raises FloatingPointError that names the first
        prompt whose score is NaN or infinite: one such score would spoil the advantages of the whole rollout."""
        tokens, lens = (rows.split(self.micro_batch_size) for rows in distributed.shard(rollout).as_ended(self.eos))
        with self.autocast():
            scores = torch.cat([reward_model(*part) for part in zip(tokens, lens)])
        scores = distributed.gather(scores)
        if not scores.isfinite().all():
            i = int((~scores.isfinite()).nonzero()[0])
            raise FloatingPointError(f"the reward model's score is {scores[i].item()} for the prompt {texts[i][0]!r} "
                                     f"and the response {texts[i][1]!r}: train it again with a lower --lr")
        return scores

    def score_by_function(self, reward_function, rollout, texts):
        """Scores (B,) of a Python function. Each process calls it with its shard of the texts."""
        scores = call_reward_function(reward_function, *map(list, zip(*distributed.shard(texts))))
        return distributed.gather(scores.to(self.device))

    def reward_fn(self, reward):
        """(rollout, texts) -> scores (B,), by a RewardModel or by a Python function."""
        return partial(self.score_by_model if isinstance(reward, torch.nn.Module) else self.score_by_function, reward)

    def evaluate(self, evaluator, policy, texts, heldout):
        """The task's own measures of a rollout, evaluator(texts), with gold_heldout of sampled answers to the prompts
        `heldout`, if any. {} without an evaluator."""
        if evaluator is None:
            return {}
        measured = evaluator(texts)
        if heldout:
            _, answers = self.collect(policy, distributed.fill_up(heldout), self.rng("heldout"))
            measured["gold_heldout"] = evaluator(answers[:len(heldout)])["gold"]
        return measured

    # -- log-probs and values

    def minibatch_passes(self, rollout, order=None):
        """For each minibatch a list of this process's micro-batches (rows, T, token_fraction). `order` permutes the
        rollout's rows first; None keeps them.

        A micro-batch is one forward pass over tokens[rows, :T], rows of similar length. token_fraction is its part of
        the minibatch's response tokens on all processes. The mean losses of the micro-batches, times token_fraction,
        add up to the minibatch's mean over tokens."""
        lens, n_tokens = rollout.lens.cpu(), rollout.response_lens.cpu()  # so that nothing below waits for the device
        order = torch.arange(len(lens)) if order is None else order
        minibatches = order.split(self.config.batch_size // self.config.minibatches)
        return [[(rows.to(self.device), T, (n_tokens[rows].sum() / n_tokens[minibatch].sum()).item())
                 for rows, T in length_buckets(lens, distributed.shard(minibatch), self.micro_batch_size)]
                for minibatch in minibatches]

    def recompute(self, model, rollout, passes, entropy=False):
        """[logprobs, values], and entropy if asked for, each (B, R), of a whole rollout under `model`. The passes are
        those of the update's first epoch: with other row counts a matrix product may round differently, and then the
        first ratio would not be exactly 1."""
        return self.in_passes(partial(self.score_response, model, entropy=entropy), rollout, passes)

    def recompute_values(self, critic, rollout, passes):
        """values (B, R) of a separate critic, in these very passes."""
        return self.in_passes(lambda *rows: (self.score_values(critic, *rows),), rollout, passes)[0]

    @torch.no_grad()
    def in_passes(self, score, rollout, passes):
        """Runs score(tokens, prompt_lens, R) on every micro-batch of all processes. Returns its tensors for the whole
        rollout, each (B, R, ...), rows in the rollout's order."""
        results = None
        for rows, T, _ in chain(*passes):
            tensors = score(rollout.tokens[rows, :T], rollout.prompt_lens[rows], rollout.mask.size(1))
            tensors = [part for part in tensors if part is not None]
            results = results or [part.new_zeros(len(rollout.mask), *part.shape[1:]) for part in tensors]
            for result, part in zip(results, tensors):
                result[rows] = part
        return [distributed.sum_tensor(result) for result in results]  # the rows of other processes are 0 here

    def preview(self, policy, reference, reward_fn, prompts, purpose):
        """[(prompt, response, score, KL)] of sampled answers to prompts. The generator is for the purpose only, so that
        looking at a run does not change it."""
        rollout, texts = self.collect(policy, distributed.fill_up(prompts), self.rng(purpose))
        passes = self.minibatch_passes(rollout)
        logprobs, ref_logprobs = (self.recompute(model, rollout, passes)[0] for model in (policy, reference))
        kls = ((logprobs - ref_logprobs) * rollout.mask).sum(1)
        rows = [(*text, score, kl) for text, score, kl in zip(texts, reward_fn(rollout, texts).tolist(), kls.tolist())]
        return rows[:len(prompts)]


# ---------------------------------------------------------------------------------------------------------------------
# a reward that is a Python function of the user's

def load_reward_function(spec):
    """`path/to/file.py:function` -> the function, `rm` -> None. Raises UserError if it is not there."""
    if spec == "rm":
        return None
    file, _, name = spec.rpartition(":")
    require(file.endswith(".py") and name, f"--reward={spec} must be rm or path/to/file.py:function")
    require(Path(file).is_file(), f"--reward={spec}: {file} is not there")
    module_spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    require(callable(getattr(module, name, None)), f"--reward={spec}: {file} has no function {name}")
    return getattr(module, name)


def call_reward_function(reward_function, prompts, responses):
    """Scores (B,): a finite number for each response, or UserError. An exception of the function is raised again with
    the prompt that caused it, below the traceback into the user's file."""
    try:
        scores = reward_function(prompts, responses)
    except Exception as error:
        where = first_failing(reward_function, prompts, responses)
        raise RuntimeError(f"the reward function raised {error!r} for {where}") from error
    require(hasattr(scores, "__len__") and len(scores) == len(responses), f"the reward function returned "
            f"{len(scores) if hasattr(scores, '__len__') else scores!r} for {len(responses)} responses: it must "
            "return a list of as many numbers")
    for prompt, response, score in zip(prompts, responses, scores):
        require(isinstance(score, Real) and math.isfinite(score), f"the reward function returned {score!r} for "
                f"the prompt {prompt!r} and the response {response!r}: it must be a finite number")
    return torch.tensor([float(score) for score in scores])


def first_failing(reward_function, prompts, responses):
    """The first response that makes the function raise when it is called for that one alone, in words."""
    for prompt, response in zip(prompts, responses):
        try:
            reward_function([prompt], [response])
        except Exception:
            return f"the prompt {prompt!r} and the response {response!r}"
    return f"{len(prompts)} responses at once and for none of them alone; the first prompt is {prompts[0]!r}"
