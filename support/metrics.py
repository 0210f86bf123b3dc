"""
Logging and health checks: metrics.jsonl, samples.jsonl, a line on the screen, TensorBoard and Weights & Biases where
asked for, and a warning when a number says that something is wrong. docs/metrics.md explains each metric.
"""

import dataclasses
import json
import math
import os
import platform
import subprocess
import threading
import time
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Callable, Optional, Union

import numpy
import tiktoken
import torch

from ppo import explained_variance, kl_estimate, masked_mean, reward_to_go
from support import distributed
from support.checkpoint import atomic_write

# The screen's columns for each stage, in order. A metric that is not measured in every iteration comes last.
COLUMNS = {
    "sft": {"loss": "7.4f", "grad_norm": "6.2f", "heldout_loss": "7.4f"},
    "rm": {"loss": "7.4f", "accuracy": ".3f", "heldout_loss": "7.4f", "heldout_accuracy": ".3f"},
    "ppo": {"score": "+.2f", "kl": ".2f", "gold": ".3f", "entropy": ".2f", "clip_frac": ".3f",
            "explained_variance": "+.2f", "response_len": ".1f", "eos_rate": ".2f", "gold_heldout": ".3f",
            "eval": "+.3f", "eval_se": ".3f"},
    "trpo": {"score": "+.2f", "kl": ".2f", "reward": "+.2f", "gold": ".3f", "entropy": ".2f", "approx_kl": ".4f",
             "surrogate_gain": ".3f", "step_fraction": ".2f", "explained_variance": "+.2f", "gold_heldout": ".3f"}}
SHORT = {"entropy": "ent", "clip_frac": "clip", "explained_variance": "ev", "response_len": "len", "eos_rate": "eos",
         "gold_heldout": "held", "eval_se": "se"}  # their names on the screen
SILENCE = 10  # seconds after which a line is shown, whatever log_interval says


# ---------------------------------------------------------------------------------------------------------------------
# the numbers of an iteration

def rollout_metrics(rollout, has_eos, scores, rewards, old_logprobs, ref_logprobs, old_values, entropy, gamma):
    """The metrics of a scored rollout: tensors (B,) and (B, R) of the whole rollout -> {name: scalar tensor}. The
    explained variance is of the reward-to-go: lambda-returns contain the critic's values and would flatter the critic.
    """
    mask = rollout.mask
    B, n_tokens = mask.size(0), mask.sum()
    gap = (rollout.logprobs - old_logprobs)[mask].abs()
    kl = masked_mean(kl_estimate(old_logprobs, ref_logprobs), mask) * n_tokens / B  # nats per response
    return {"score": scores.mean(), "score_std": scores.std(unbiased=False), "kl": kl, "reward": rewards.sum() / B,
            "entropy": masked_mean(entropy, mask), "response_len": n_tokens / B, "eos_rate": has_eos.float().mean(),
            "explained_variance": explained_variance(old_values, reward_to_go(rewards, mask, gamma), mask),
            "logprob_gap": gap.mean(), "logprob_gap_max": gap.max()}


class Averages:
    """Means and maxima over the passes of an update, and over all processes. Nothing waits for the device before
    `reduce`."""
    MAXIMA = ("ratio_first", "ratio_max")

    def __init__(self):
        self.sums, self.maxima = defaultdict(float), {}

    def add(self, weight, **values):
        """Adds weight * value for each; of those named in MAXIMA, the largest is kept."""
        for name, value in values.items():
            if name in self.MAXIMA:
                self.maxima[name] = torch.maximum(self.maxima.get(name, value), value)
            else:
                self.sums[name] += value.detach() * weight

    def reduce(self, n):
        """{name: sum / n or maximum}, where the weights of all processes add up to n. All processes call it."""
        means = [value / n for value in distributed.all_reduce_sum(*self.sums.values())]
        return dict(zip(self.sums, means)) | dict(zip(self.maxima, distributed.all_reduce_max(*self.maxima.values())))


# ---------------------------------------------------------------------------------------------------------------------
# metrics.jsonl, samples.jsonl and the screen

class Metrics:
    """Writes metrics.jsonl, one line per iteration. Shows an aligned line on the screen every log_interval iterations
    or SILENCE seconds, and whenever --eval was measured.

    The stages of an out_dir share the file. Opening it drops this stage's lines after iteration `start`, that of the
    resumed checkpoint. A fresh start (0) drops all of them and writes a new header line. PPO's samples.jsonl has a
    row {iter, prompt, response, score, ...} for each sample and is cut in the same way."""

    def __init__(self, config, stage, start=0):
        self.config, self.stage, self.start, self.path = config, stage, start, config.folder / "metrics.jsonl"
        self.samples_path, head = self.path.with_name("samples.jsonl"), header(config, stage)
        kept = [row for row in whole_lines(self.path)
                if row["stage"] != stage or (start > 0 and row.get("iter", 0) <= start)]
        if start == 0:
            kept.append(head)
        first = distributed.is_first()  # the other processes keep count and write nothing
        if first:
            write_lines(self.path, kept)
        if first and stage == "ppo" and self.samples_path.exists():
            samples = whole_lines(self.samples_path, "iter")
            write_lines(self.samples_path, [row for row in samples if row["iter"] <= start])

        stage_rows = [row for row in kept if row["stage"] == stage]
        self.rows, self.warned, self.widths = [head], set(), {}
        for row in stage_rows:
            if "iter" in row:
                self.warnings(row)  # a warning given before the interruption is not repeated
        self.tensorboard = open_tensorboard(config, stage, start) if first and config.tensorboard else None
        self.wandb = open_wandb(config, stage, (stage_rows or [head])[0]) if first and config.wandb else None
        self.last = self.shown = time.time()
        self.warm = None  # when the first iteration was done: it includes the warm-up and would spoil the eta

    def write(self, iteration, metrics, samples=()):
        """Appends {stage, iter, seconds, **metrics}, and the samples if there are any. Shows COLUMNS if a line is due,
        and prints the warnings of HEALTH, each once in a run."""
        now = time.time()
        row = {"stage": self.stage, "iter": iteration, "seconds": round(now - self.last, 4)}
        row |= dict(zip(metrics, map(clean, distributed.numbers(metrics.values()))))
        self.last = now
        append_lines(self.path, [row])
        if samples:
            append_lines(self.samples_path, [{"iter": iteration} | sample for sample in samples])
        due = iteration % self.config.log_interval == 0 or iteration in (self.start + 1, self.config.max_iters)
        due = due or "eval" in row
        if due or now - self.shown >= SILENCE:
            columns = [self.column(name, format(row[name], spec)) for name, spec in COLUMNS[self.stage].items()
                       if row.get(name) is not None]
            print(f"{self.stage} {iteration:>{len(str(self.config.max_iters))}}/{self.config.max_iters}  eta "
                  f"{self.eta(iteration, now)}  " + "  ".join(columns), flush=True)
            self.shown = now
        self.warm = self.warm or now
        for warning in self.warnings(row):
            print(warning, flush=True)

        numbers = {name: value for name, value in row.items() if isinstance(value, (int, float))}
        if self.tensorboard:
            for name, value in numbers.items():
                self.tensorboard.add_scalar(name, value, iteration)
            self.tensorboard.flush()  # or a kill -9 would lose the last two minutes
        if self.wandb:
            self.wandb.log(numbers)
        return row

    def eta(self, iteration, now):
        """Time left, as minutes:seconds, from all iterations but the first; dashes until there is a second."""
        if iteration == self.config.max_iters:
            return "  0:00"
        if self.warm is None:
            return "  -:--"
        left = int((now - self.warm) / (iteration - self.start - 1) * (self.config.max_iters - iteration))
        return f"{left // 60:3}:{left % 60:02}"

    def column(self, name, number):
        """The column's text. A number that is wider than any before it widens the column from here on."""
        self.widths[name] = max(self.widths.get(name, 0), len(number))
        return f"{SHORT.get(name, name)} {number:>{self.widths[name]}}"

    def warnings(self, row):
        """Records the next line of the stage. Returns a sentence for each rule that breaks for the first time."""
        self.rows.append(row)
        broken = [rule for rule in HEALTH if rule not in self.warned and rule.broken(self.rows)]
        self.warned.update(broken)
        return [f"warning: {rule.sentence(self.rows)}" for rule in broken]


def whole_lines(path, key="stage"):
    """The rows of metrics.jsonl, or of samples.jsonl with the key "iter"; [] without the file. A line that a crash
    cut off is left out."""
    rows = map(parse, path.read_text(errors="replace").splitlines() if path.exists() else [])
    return [row for row in rows if isinstance(row, dict) and key in row]


def parse(line):
    """The value of a line of JSON; None if the line is incomplete."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def write_lines(path, rows):
    """Replaces a file's contents with rows, completely or not at all."""
    with atomic_write(path) as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())


def append_lines(path, rows):
    """Appends rows to a file, in the first process. Raises OSError that names the file."""
    try:
        with open(path if distributed.is_first() else os.devnull, "a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
    except OSError as error:
        raise OSError(f"could not write {path} ({error.strerror or error})") from error


def clean(value):
    """The number for JSON; None for NaN and inf, which JSON cannot express."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def header(config, stage):
    """The line that says how the lines after it were made: flags, versions, device, commit."""
    cuda = torch.cuda.is_available() and config.device != "cpu"
    return {"stage": stage, "flags": dataclasses.asdict(config), "torch": torch.__version__,
            "numpy": numpy.__version__, "tiktoken": tiktoken.__version__, "python": platform.python_version(),
            "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
            "cuda": cuda, "threads": torch.get_num_threads(), "processes": distributed.size(),
            "began": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "commit": commit()}


def commit():
    """git's name for the commit of this clone; None without .git or without the git program."""
    here = Path(__file__).parents[1]
    if not (here / ".git").exists():
        return None
    try:
        git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True)
    except OSError:
        return None
    return git.stdout.strip() if git.returncode == 0 else None


def print_report(config, report, more=""):
    """Prints what became of the rows of --data, and `more`, on one line, then each warning on its own line."""
    warnings = [line for line in report if line.startswith("warning: ")]
    print(f"{config.data}: {'; '.join(line for line in report if line not in warnings)}{more}")
    for warning in warnings:
        print(warning)


def print_samples(samples):
    """Prints samples, as in samples.jsonl, between two lines of metrics."""
    for row in samples:
        print(f"    score {row['score']:+.2f}  kl {row['kl']:5.2f}  {row['prompt']!r} -> {row['response']!r}")


def print_before_after(before, after):
    """Prints a table of samples for the same prompts before and after training."""
    print("\nthe same questions before (SFT) and after (PPO): score, KL to the SFT policy, one sampled answer")
    for rows in zip(before, after):
        print(rows[0]["prompt"])
        for name, row in zip(("before", "after"), rows):
            print(f"    {name:<7}{row['score']:+6.2f}  {row['kl']:6.2f}  {row['response']!r}")


@contextmanager
def only_looking():
    """Prints an error in the block instead of raising it. Showing a few answers must not end a run, e.g. if a reward
    function fails on one of them. With many processes it is raised, because the others wait inside the same block."""
    try:
        yield
    except Exception as error:
        if distributed.size() > 1:
            raise
        print(f"note: no samples are shown: {error or type(error).__name__}", flush=True)


@contextmanager
def progress(what, state=lambda: ""):
    """Prints `what`, the seconds so far and state() every SILENCE seconds while the block runs; nothing if it is
    quick."""
    done, began = threading.Event(), time.time()

    def report():
        while not done.wait(SILENCE):
            print(f"{what}: {time.time() - began:.0f} s {state()}".rstrip(), flush=True)

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


# ---------------------------------------------------------------------------------------------------------------------
# the same numbers elsewhere; Flags.check has checked that the packages are installed

def open_tensorboard(config, stage, start):
    """A SummaryWriter in out_dir/tensorboard/<stage>. TensorBoard drops what earlier files there say about iterations
    after `start`. So a resumed run continues its curve, and a run that replaces another begins a new one."""
    from torch.utils.tensorboard import SummaryWriter
    return SummaryWriter(config.folder / "tensorboard" / stage, purge_step=start + 1)


def open_wandb(config, stage, first_line):
    """A run of Weights & Biases, its files under out_dir. Its id is made from the stage's header line, which a resumed
    run keeps, so that it continues the same run. wandb's environment variables apply (WANDB_MODE=offline)."""
    import wandb
    run = wandb.init(project="rlhf-ppo", group=config.folder.name, name=f"{config.folder.name}-{stage}",
                     dir=config.folder, config=dataclasses.asdict(config),
                     id=sha256(json.dumps(first_line).encode()).hexdigest()[:16], resume="allow",
                     reinit="finish_previous")  # train_ppo.py may run the earlier stages in the same process
    run.define_metric("*", step_metric="iter")  # wandb's own count would refuse repeated iterations
    return run


# ---------------------------------------------------------------------------------------------------------------------
# when a number says that something is wrong
#
# A rule reads `rows`: the header of a stage, then its lines so far. A healthy run must give no false alarm: a metric
# that is noisy in one iteration is averaged over several, so a rule may miss a fault.

def objective(row):
    """J = score - kl_coef * KL, which PPO maximises with the KL in the reward or in the loss; None without these."""
    score, kl_coef, kl = (row.get(name) for name in ("score", "kl_coef", "kl"))
    return None if None in (score, kl_coef, kl) else score - kl_coef * kl


def objectives(rows):
    """J of the lines that have it, all at the lowest kl_coef so far. Else J would fall when --kl_target raises kl_coef.
    """
    lowest = min((row["kl_coef"] for row in rows[1:] if row.get("kl_coef") is not None), default=None)
    values = [objective(row | {"kl_coef": lowest}) for row in rows[1:]]
    return [J for J in values if J is not None]


def mean(values):
    return sum(values) / len(values) if values else math.nan


def recent(rows, metric, n):
    """The metric in the last n lines; [] if one of them lacks it."""
    values = [row.get(metric) for row in rows[-n:]]
    return [] if None in values or len(values) < n else values


def at_start(rows, metric):
    """The metric's mean over the first 5 iterations."""
    return mean([row[metric] for row in rows[1:6] if row.get(metric) is not None])


def moved(values):
    """The mean of the last 10 minus that of the 10 before, in standard errors of the difference. NaN without both."""
    halves = values[-20:-10], values[-10:]
    variance = sum(sum((x - mean(part)) ** 2 for x in part) / 9 / 10 for part in halves)
    return (mean(halves[1]) - mean(halves[0])) / max(math.sqrt(variance), 1e-12)


def flag(rows, name):
    return rows[0]["flags"].get(name)


def bitwise(rows):
    """Whether two passes over the same tokens agree to the last bit: float32 on a CPU, not compiled."""
    return not (rows[0]["cuda"] or flag(rows, "dtype") == "bfloat16" or flag(rows, "compile"))


def gained_nothing(rows):
    """Whether entropy fell without a gain in J. Low entropy alone proves nothing: a policy that has learned is sure,
    too. True if J's gain is now less than half of its largest gain so far. With a reward model, whose unit is the
    spread of the SFT policy's answers, also if it is less than half of that unit."""
    J = objectives(rows)
    means = [mean(J[i:i + 5]) for i in range(len(J) - 4)]
    return bool(means) and means[-1] - means[0] < 0.5 * max(max(means) - means[0], flag(rows, "reward") == "rm")


@dataclass(frozen=True)
class Rule:
    """Broken if the mean of `metric` over its last n values lies outside [low, high], if given, and `when(rows)`
    holds, if given. A bound is a number or a function of `rows`."""
    metric: str
    what: str    # what is wrong, with {value} for that mean
    cause: str   # the likeliest cause
    remedy: str  # the flag to try
    n: int = 1
    low: Union[float, Callable, None] = None
    high: Union[float, Callable, None] = None
    when: Optional[Callable] = None

    def bounds(self, rows):
        """(low, high) in a run, None where a side is open."""
        return tuple(bound(rows) if callable(bound) else bound for bound in (self.low, self.high))

    def broken(self, rows):
        values = recent(rows, self.metric, self.n)
        if not values:
            return False
        low, high = self.bounds(rows)
        outside = (low is not None and mean(values) < low) or (high is not None and mean(values) > high)
        return (outside or low is high is None) and (self.when is None or self.when(rows))

    def sentence(self, rows):
        value = mean(recent(rows, self.metric, self.n))
        return f"{self.what.format(value=value)}. Likely cause: {self.cause}. Try {self.remedy}"


HEALTH = (
    Rule("kl", "kl is {value:.2f} nats over 5 iterations, though no KL is below 0",
         "the log-probs are not those of the distribution that was sampled, or a rollout is too small to tell",
         "--dtype=float32, then a larger --batch_size", n=5, low=-0.1),
    Rule("kl", "kl is {value:.1f} nats over 5 iterations, more than 30 or than one for every two tokens",
         "the policy has left the text that the reward model can judge", "a higher --kl_coef, and read the samples",
         n=5, high=10.0,
         when=lambda rows: mean(recent(rows, "kl", 5)) > min(30, mean(recent(rows, "response_len", 5)) / 2)),
    Rule("score", "score rises to {value:+.2f} while J = score - kl_coef * kl falls",
         "the KL costs more than the score gains, so the update does not follow J", "a lower --lr, or fewer --epochs",
         n=10, when=lambda rows: moved(recent(rows, "score", 20)) > 2 and moved(objectives(rows)) < -2),
    Rule("score_std", "score_std is 0 over 3 iterations: all responses have the same score, so nothing can be learned",
         "the reward is the same for all responses so far", "another --reward, a larger --batch_size, or a reward that "
         "gives part of the score for part of the task", n=3, when=lambda rows: max(recent(rows, "score_std", 3)) == 0),
    Rule("eos_rate", "eos_rate is {value:.2f} over 5 iterations: more than half of the responses are cut",
         "longer answers score higher, stopping is not learned yet, or an answer needs more tokens",
         "a higher --eos_penalty, or --max_new_tokens", n=5, low=0.5),
    Rule("entropy", "entropy has fallen to {value:.3f} nats per token and J has not gained by it",
         "the policy became sure of an answer before it had tried others", "a lower --lr, or --ent_coef=0.01", n=5,
         low=lambda rows: 0.1 * at_start(rows, "entropy"), when=gained_nothing),
    Rule("ratio_first", "ratio_first is {value:.1e}: the ratio was not 1 before any update",
         "the old log-probs are not computed like the new ones (temperature, dropout, shape of the passes)",
         "--dtype=float32, and no --compile",
         when=lambda rows: rows[-1]["ratio_first"] > (0 if bitwise(rows) else 0.05)),
    Rule("logprob_gap", "logprob_gap is {value:.1e}: sampling and training disagree about the same tokens",
         "passes with the KV cache compute something different from full passes", "--dtype=float32",
         when=lambda rows: rows[-1]["logprob_gap"] > (1e-4 if bitwise(rows) else 0.05)),
    Rule("clip_frac", "clip_frac is {value:.2f} over 5 iterations", "the steps are too large for the clip",
         "a lower --lr, or fewer --epochs", n=5, high=0.3),
    Rule("approx_kl", "approx_kl is {value:.2f} nats per token over 5 iterations",
         "the updates end far from the policy that sampled their data", "a lower --lr, fewer --epochs, or "
         "--target_kl=0.03", n=5, high=0.1),
    Rule("explained_variance", "explained_variance is {value:.2f} over 20 iterations: the critic misleads",
         "the critic learns too slowly", "a higher --lr, more --epochs, or --advantage=group (no critic)", n=20,
         low=0.0, when=lambda rows: flag(rows, "critic") and mean(recent(rows, "explained_variance", 5)) < 0),
    Rule("grad_norm", "grad_norm is {value:.1f} over 5 iterations, more than 10 times --grad_clip",
         "the loss is steep at the current weights, so the steps are too large", "a lower --lr", n=5,
         when=lambda rows: mean(recent(rows, "grad_norm", 5)) > 10 * flag(rows, "grad_clip")),
    Rule("skipped_steps", "skipped_steps is {value:.0f}: a loss or a gradient was not finite",
         "weights, rewards or a ratio have grown too large", "a lower --lr, or --dtype=float32", high=0.0),
)
