"""
Making experience: prompts -> sampled responses -> scores -> recomputed log-probs and values, on all processes.

Shapes: B responses of at most R tokens, T = prompt + response. Under torchrun every process samples, scores and
recomputes its shard of the rows, and every process gets the results for all B. In one process there is one shard.
"""

import importlib.util
import inspect
import reprlib
import sys
import traceback
from collections.abc import Mapping, Sequence, Set, Sized
from functools import cache, partial
from importlib.machinery import PathFinder
from itertools import chain
from numbers import Real
from pathlib import Path

import torch

from data import collate_prompts, length_buckets, spread
from rollout import generate, score_response, score_values
from support import distributed
from support.device import generator, maybe_compile
from support.flags import UserError, require
from support.metrics import mean, only_looking
from tokenizer import decode, eos_ids

HELDOUT_PROMPTS = 256  # a look at held-out prompts samples answers to at most this many
SHOWN_SAMPLES = 16     # of these answers, samples.jsonl gets this many


class WhenRead(Sequence):
    """The list that make() returns, made when it is first read: a reward model reads no texts, and a GPU would wait
    while they are made."""

    def __init__(self, make):
        self.make = cache(make)

    def __len__(self):
        return len(self.make())

    def __getitem__(self, i):
        return self.make()[i]


class Experience:
    """Sampling and scoring at one run's settings: its encoding, device, precision, temperature, rows per pass.

    score_response and score_values are rollout.py's, at the run's temperature and precision and compiled if it asks for
    that. The update calls the same two, so that it computes what `recompute` computed."""

    def __init__(self, config, encoding, device, autocast, micro_batch_size, chunk=None):
        self.config, self.encoding, self.device, self.autocast = config, encoding, device, autocast
        ids = eos_ids(encoding)
        self.eos, self.pad = ids if len(ids) > 1 else ids[0], ids[0]
        self.micro_batch_size, self.chunk = micro_batch_size, chunk
        self.score_response = autocast()(maybe_compile(
            partial(score_response, temperature=config.temperature, chunk=chunk), config.compile))
        self.score_values = autocast()(maybe_compile(score_values, config.compile))

    # -- sampling

    def rng(self, purpose, *more):
        """A generator for one purpose, different in each process."""
        return generator(self.device, self.config.seed, distributed.per_rank(purpose), *more)

    def sample(self, policy, prompts, rng, copies=1):
        """Rollout of the policy on prompts, lists of ids, each repeated `copies` times in a row. All processes must get
        equally many (distributed.fill_up)."""
        prompts = distributed.shard(prompts)
        tokens, prompt_lens = (x.to(self.device) for x in collate_prompts(prompts, self.pad))
        with self.autocast(), distributed.unsharded(policy):
            rollout = generate(policy, tokens, prompt_lens, self.config.max_new_tokens, eos=self.eos,
                               temperature=self.config.temperature, generator=rng,
                               copies=1 if len(prompts) % copies else copies)
        return distributed.gather(rollout, tokens=self.pad)

    def collect(self, policy, prompts, rng, copies=1):
        """sample()'s Rollout on Prompts, and its texts [(prompt, response, row)], where row is the Prompt's."""
        rollout = self.sample(policy, prompts, rng, copies)
        return rollout, WhenRead(lambda: [(*(decode(self.encoding, ids) for ids in row), prompt.row)
                                          for row, prompt in zip(rollout.ids(), prompts)])

    # -- scores

    @torch.no_grad()
    def score_by_model(self, reward_model, rollout, texts):
        """Scores (B,) by a reward model of texts that all end with EOS, and {}, because it has no parts. Raises a
        FloatingPointError that names the first prompt whose score is NaN or infinite: one such score would spoil the
        advantages of the whole rollout."""
        tokens, lens = (rows.split(self.micro_batch_size) for rows in distributed.shard(rollout).as_ended(self.eos))
        with self.autocast():
            scores = torch.cat([reward_model(*part) for part in zip(tokens, lens)])
        scores = distributed.gather(scores)
        if not scores.isfinite().all():
            i = int((~scores.isfinite()).nonzero()[0])
            raise FloatingPointError(f"the reward model's score is {scores[i].item()} for the prompt {texts[i][0]!r} "
                                     f"and the response {texts[i][1]!r}: train it again with a lower --lr")
        return scores, {}

    def score_by_function(self, reward_function, rollout, texts):
        """Scores (B,) of a RewardFunction, and its parts {name: (B,)}. Each process calls it with its shard of the
        texts."""
        scores, parts = reward_function(*map(list, zip(*distributed.shard(texts))))
        names = distributed.gather([[*parts]])
        require(names.count(names[0]) == len(names), f"{reward_function.name} returned the parts {names[0]} in one "
                f"process and {next((other for other in names if other != names[0]), None)} in another: it must return "
                "the same names in each call")
        columns = distributed.gather(torch.stack([scores, *parts.values()], dim=1)).to(self.device)
        return columns[:, 0], dict(zip(parts, columns[:, 1:].unbind(1)))

    def reward_fn(self, reward):
        """(rollout, texts) -> scores (B,), {part: (B,)}, by a RewardModel or by a RewardFunction."""
        return partial(self.score_by_model if isinstance(reward, torch.nn.Module) else self.score_by_function, reward)

    # -- log-probs and values

    def minibatch_passes(self, rollout, order=None):
        """For each minibatch a list of this process's micro-batches (rows, T, token_fraction). `order` permutes the
        rollout's rows first; None keeps them.

        A micro-batch is one forward pass over tokens[rows, :T], rows of similar length. token_fraction is its part of
        the minibatch's response tokens on all processes. The mean losses of the micro-batches, times token_fraction,
        add up to the minibatch's mean over tokens."""
        # One copy from the device and one back, because each copy waits for the device
        lens, n_tokens = torch.stack([rollout.lens, rollout.response_lens]).cpu()
        order = torch.arange(len(lens)) if order is None else order
        minibatches = order.split(self.config.batch_size // self.config.minibatches)
        buckets = [length_buckets(lens, distributed.shard(minibatch), self.micro_batch_size)
                   for minibatch in minibatches]
        every = [rows for bucket in buckets for rows, _ in bucket]
        moved = iter(torch.cat(every).to(self.device).split([len(rows) for rows in every]))
        return [[(next(moved), T, (n_tokens[rows].sum() / n_tokens[minibatch].sum()).item()) for rows, T in bucket]
                for bucket, minibatch in zip(buckets, minibatches)]

    def recompute(self, model, rollout, passes, entropy=False):
        """[logprobs, values], and entropy if asked for, each (B, R), of a whole rollout under `model`. The passes are
        those of the update's first epoch: with other row counts a matrix product may round differently, and then the
        first ratio would not be exactly 1."""
        return self.in_passes(partial(self.score_response, model, entropy=entropy), rollout, passes)

    def recompute_values(self, critic, rollout, passes):
        """values (B, R) of a separate critic, in the same passes."""
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
        """A sampled answer to each of prompts: dicts of prompt, response, score, kl, tokens, ended and the parts of the
        score. The generator serves this purpose only, so that looking at a run does not change it."""
        samples, rng = [], self.rng(purpose)
        for first in range(0, len(prompts), self.config.batch_size):  # a rollout of this size is known to fit in memory
            asked = prompts[first:first + self.config.batch_size]
            rollout, texts = self.collect(policy, distributed.fill_up(asked), rng)
            passes = self.minibatch_passes(rollout)
            # The policy's pass computes an unused entropy, because the loop has compiled that pass and no other.
            logprobs, ref_logprobs = (self.recompute(model, rollout, passes, entropy=model is not reference)[0]
                                      for model in (policy, reference))
            scores, parts = reward_fn(rollout, texts)
            numbers = {"score": scores, "kl": ((logprobs - ref_logprobs) * rollout.mask).sum(1),
                       "tokens": rollout.response_lens, "ended": rollout.has_eos(self.eos)} | parts
            columns = zip(*(column.tolist() for column in numbers.values()))
            samples += [{"prompt": prompt, "response": response} | dict(zip(numbers, row))
                        for (prompt, response, _), row in zip(texts[:len(asked)], columns)]
        return samples


class HeldOut:
    """Looks at held-out prompts: what a policy answers, and how the reward, --eval and a task with its own judge rate
    the answers. There are at most HELDOUT_PROMPTS prompts, always the same."""

    def __init__(self, experience, split, reference, reward_fn, eval_function=None, evaluator=None):
        self.experience, self.reference, self.reward_fn = experience, reference, reward_fn
        self.eval_function, self.evaluator = eval_function, evaluator
        self.prompts = spread(split.heldout, HELDOUT_PROMPTS)
        self.shown = self.prompts or split.examples(SHOWN_SAMPLES)  # a file with a single prompt holds none out

    def look(self, policy):
        """The metrics of sampled answers to the held-out prompts, and SHOWN_SAMPLES of these. An error of --reward
        does not end a run here, because no rollout has these prompts; an error of --eval does."""
        samples = []
        with only_looking():
            samples = self.experience.preview(policy, self.reference, self.reward_fn, self.shown, "heldout")
        return self.measure(samples) if samples and self.prompts else {}, spread(samples, SHOWN_SAMPLES)

    def task(self, texts):
        """The task's own metrics of texts; {} if it cannot judge."""
        return self.evaluator([text[:2] for text in texts]) if self.evaluator else {}

    def measure(self, samples):
        """{metric: number} of samples, which answer the held-out prompts."""
        texts = [(sample["prompt"], sample["response"], prompt.row) for sample, prompt in zip(samples, self.prompts)]
        measured = {f"{name}_heldout": mean([sample[name] for sample in samples]) for name in ("score", "kl")}
        if self.evaluator:
            measured["gold_heldout"] = self.task(texts)["gold"]
        if self.eval_function:
            scores, parts = self.experience.score_by_function(self.eval_function, None, distributed.fill_up(texts))
            scores, n = scores[:len(texts)], len(texts)
            standard_error = scores.std(unbiased=False) / (n - 1) ** 0.5 if n > 1 else None
            measured |= {"eval": scores.mean(), "eval_se": standard_error}
            measured |= {name: part[:n].mean() for name, part in parts.items()}
        return measured


# ---------------------------------------------------------------------------------------------------------------------
# a reward or an evaluation that is a Python function of the user's

HERE = Path(__file__).resolve().parent


def load_reward_function(spec, flag="reward"):
    """`path/to/file.py:function` -> RewardFunction; `rm` and None -> None. Raises UserError if it is missing, cannot
    be imported or does not take a reward function's arguments."""
    if spec in (None, "rm"):
        return None
    function = load_function(spec, flag)
    try:
        inspect.signature(function).bind(*range(3 if takes_rows(function) else 2))
    except TypeError:
        raise UserError(f"--{flag}={spec} takes {inspect.signature(function)}: it must take (prompts, responses) or "
                        "(prompts, responses, rows)") from None
    except ValueError:  # some functions in C do not say what they take
        pass
    return RewardFunction(function, flag)


def sides_with_rows(reward_function, eval_function):
    """The sides of a Split whose prompts must carry their row. An evaluation sees only held-out prompts, so that the
    rollouts of a run are the same with and without it."""
    takers = [function for function in (reward_function, eval_function) if function and function.takes_rows]
    return ("train", "heldout") if reward_function in takers else ("heldout",) * len(takers)


def load_function(spec, flag):
    """The function that a flag names. Raises UserError if it is missing or the file cannot be imported."""
    what = "rm or " if flag == "reward" else ""
    file, _, name = spec.rpartition(":")
    require(file.endswith(".py") and name, f"--{flag}={spec} must be {what}path/to/file.py:function")
    require(Path(file).is_file(), f"--{flag}={spec}: {file} is not there")
    path = Path(file).resolve()
    try:
        module = import_file(path, path.read_bytes())
    except SyntaxError as error:
        raise UserError(f"--{flag}={spec}: {error.filename or file}, line {error.lineno or 1}: {error.msg}") from error
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f", line {lines[-1]}," if lines else ""
        raise UserError(f"--{flag}={spec}: {file}{where} raised {error!r} when it was imported; `python {file}` shows "
                        "the whole traceback") from error
    require(callable(getattr(module, name, None)), f"--{flag}={spec}: {file} has no function {name}")
    return getattr(module, name)


@cache
def import_file(path, source):
    """The module of a user's file. Its imports work as under `python path`: it finds itself in sys.modules and the
    files beside it, also in processes that it forks or spawns. If a file beside it has the name of one of ours, its
    top-level imports get the user's file, and all other code gets ours."""
    name, root = importable_name(path)
    folder, ours = path.parent, {item.stem for item in HERE.iterdir()} - {path.stem}
    shared = {stem for stem in ours if folder != HERE and any(
        file.is_file() for file in (folder / f"{stem}.py", folder / stem / "__init__.py"))}

    def take_out():
        return {key: sys.modules.pop(key) for key in [*sys.modules] if key.partition(".")[0] in shared}

    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location(name, path))
    aside, sys.modules[name] = take_out(), module
    sys.path.insert(0, str(folder))
    try:
        exec(compile(source, str(path), "exec", dont_inherit=True), vars(module))
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        take_out()
        sys.modules.update(aside)
        sys.path[:] = [entry for entry in sys.path if entry != str(folder)]
        sys.path.insert(1, str(folder))  # behind the folder of the script, so that children find our files first
        sys.path.extend([str(root)] if root != folder else [])
    return module


@cache
def importable_name(path):
    """(name, root): the name under which a child process can import the file, once root is on its sys.path. If
    another module has the file's name, names of folders are put before it."""
    importlib.invalidate_caches()
    for root in path.parents:
        parts = path.relative_to(root).with_suffix("").parts
        name, top = ".".join(parts), str(root / parts[0])
        free = name not in sys.modules and name.count(".") == len(parts) - 1  # and no folder has a dot in its name
        found = free and PathFinder.find_spec(parts[0], [*sys.path, str(root)])
        if found and (found.origin == str(path) or set(found.submodule_search_locations or ()) == {top}):
            return name, root
    return str(path).replace(".", "_"), path.parent  # a name that forked children know


def takes_rows(function):
    """Whether a function is called with rows: its third positional parameter has no default or is named `rows`. So
    f(prompts, responses, scale=2) keeps its scale, and the *args of a wrapper get two lists."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    third = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][2:3]
    return any(p.default is p.empty or p.name == "rows" for p in third)


class RewardFunction:
    """A Python function of --reward or --eval: f(prompts, responses[, rows]), called with lists of equal length.
    It returns a number for each response, or {part: such numbers}, and then the score is their sum."""

    def __init__(self, function, flag="reward"):
        self.function, self.flag, self.takes_rows = function, flag, takes_rows(function)
        self.name = f"the {flag} function {getattr(function, '__name__', type(function).__name__)}"
        self.parts = None  # the names of the parts, known from the first call on

    def __call__(self, prompts, responses, rows):
        """Scores (B,) and {"reward_<part>" or "eval_<part>": (B,)}, all finite, or UserError. An exception of the
        function is raised again with the prompt that caused it, below the traceback into the user's file."""
        columns = (prompts, responses, rows)[:3 if self.takes_rows else 2]
        try:
            result = self.function(*columns)
        except Exception as error:
            raise RuntimeError(f"{self.name} raised {error!r} for {first_failing(self.function, *columns)}") from error
        parts = dict(sorted(result.items(), key=lambda part: str(part[0]))) if isinstance(result, Mapping) else {}
        self.check_names([*parts], result)
        numbers = {f"{self.flag}_{name}": self.numbers(part, prompts, responses, f" as the part {name}")
                   for name, part in parts.items()}
        scores = [sum(row) for row in zip(*numbers.values())] if parts else result
        scores = self.numbers(scores, prompts, responses, " as the sum of its parts" if parts else "")
        return torch.tensor(scores), {name: torch.tensor(part) for name, part in numbers.items()}

    def check_names(self, names, result):
        """Raises UserError for names of parts that cannot name a column, or differ from those of the first call."""
        for name in names:
            require(isinstance(name, str) and name.isidentifier() and f"{self.flag}_{name}" != "eval_se",
                    f"{self.name} returned a part with the name {name!r}: give it a valid variable name"
                    + (", and not that of the standard error" if name == "se" else ""))
        require(names or not isinstance(result, Mapping), f"{self.name} returned a dict without parts: it must hold a "
                "list of numbers for each part")
        self.parts = names if self.parts is None else self.parts
        before, now = (", ".join(parts) or "none" for parts in (self.parts, names))
        require(before == now, f"{self.name} returned the parts {before} at first and now {now}: it must return the "
                "same names in each call")

    def numbers(self, column, prompts, responses, what):
        """What the function returned, as a list of finite floats, one for each response. Raises UserError otherwise."""
        n, no_list = len(responses), (Mapping, Set, str, bytes, bytearray)
        fits = tuple(column.shape) == (n,) if hasattr(column, "shape") else \
            isinstance(column, Sized) and len(column) == n and not isinstance(column, no_list)
        require(fits, f"{self.name} returned {in_words(column)}{what} for {n} responses: it must return a list of as "
                      f"many numbers, a tensor or array of shape ({n},), or a dict of such parts")
        column, numbers = column.tolist() if hasattr(column, "tolist") else list(column), []
        for prompt, response, value in zip(prompts, responses, column):
            number = value.item() if getattr(value, "shape", None) == () else value
            if not (isinstance(number, Real) and abs(number) <= torch.finfo(torch.float32).max):
                raise UserError(f"{self.name} returned {in_words(number)}{what} for the prompt {prompt!r} and the "
                                f"response {response!r}: it must be a finite number")
            numbers.append(float(number))
        return numbers


def in_words(value):
    """A wrong result of a reward function, in a few words whatever its size."""
    if getattr(value, "shape", ()):
        return f"a value of type {type(value).__name__} and shape {tuple(value.shape)}"
    return reprlib.repr(value) + (f" of length {len(value)}" if isinstance(value, (list, tuple, Mapping, Set)) else "")


def first_failing(reward_function, *columns):
    """The response that makes the function raise, in words: the first, if several do. Halves the columns (prompts,
    responses, and maybe rows) until one is left, because each call may take long or cost money."""
    def fails(low, high):
        try:
            reward_function(*(column[low:high] for column in columns))
        except Exception:
            return True
        return False

    low, high = 0, len(columns[0])
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fails(low, middle) else (middle, high)
    if fails(low, high):
        keys = f", whose row has {', '.join(columns[2][low])}" if len(columns) == 3 else ""
        return f"the prompt {columns[0][low]!r} and the response {columns[1][low]!r}{keys}"
    return f"{len(columns[0])} responses at once and for none of them alone; the first prompt is {columns[0][0]!r}"
