"""
What the train scripts share and a reader of PPO may skip: flags, device and precision, the optimizer step, whole files.
Nothing here knows what is being trained. Checkpoints are in checkpoint.py, metrics in metrics.py.
"""

import argparse
import ctypes
import dataclasses
import difflib
import hashlib
import importlib.util
import inspect
import math
import os
import re
import shutil
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from numbers import Real
from pathlib import Path
from typing import ClassVar, Optional, get_args, get_type_hints

import torch

import distributed


class UserError(ValueError):
    """A wrong flag, file or combination: one sentence for the person at the keyboard, exit code 2."""


# ---------------------------------------------------------------------------------------------------------------------
# flags: a flat dataclass, one line per flag, whose trailing comment is the flag's --help

@dataclass
class Flags:
    """Flags of every train script. Scripts add their own and set their own defaults."""
    data: str = "atlas"                 # atlas (built in), or a .jsonl / .jsonl.gz file
    tokenizer: Optional[str] = None     # atlas, bytes, a tiktoken name or a .tiktoken file; default: atlas or gpt2
    out_dir: Optional[str] = None       # checkpoints and metrics.jsonl go here; default: out/<data>
    init_from: Optional[str] = None     # where the weights start from
    seed: int = 0                       # everything random follows from it; report several, PPO seeds differ
    device: str = "auto"                # auto (cuda if there is one), cpu or cuda
    dtype: str = "auto"                 # auto (bfloat16 on cuda, float32 on cpu), or float32, or bfloat16 (autocast)
    compile: bool = False               # torch.compile the training passes; the first iterations then take minutes
    fsdp: bool = False                  # under torchrun: shard parameters and AdamW's moments over the processes
    max_iters: int = 0                  # iterations of this stage
    batch_size: int = 0                 # rows per iteration, of all processes together
    micro_batch_size: Optional[int] = None  # rows per forward pass; lower it when memory runs out
    recompute: bool = False             # activation checkpointing: less memory per row, for a third more arithmetic
    lr: float = 0.0                     # AdamW's learning rate
    lr_decay_iters: Optional[int] = None  # lower lr linearly to 0 over this many iterations; default: constant
    grad_clip: float = 1.0              # gradients of a larger norm are scaled down to it
    max_bad_steps: int = 3              # stop after this many optimizer steps in a row with a non-finite gradient
    n_layer: Optional[int] = None       # layers; default 2, or the checkpoint's
    n_head: Optional[int] = None        # attention heads; default 4, or the checkpoint's
    n_embd: Optional[int] = None        # width; default 128, or the checkpoint's
    block_size: Optional[int] = None    # longest prompt + response; default 256, or the checkpoint's
    log_interval: int = 10              # iterations between lines on the screen; metrics.jsonl gets every one
    save_interval: int = 100            # iterations between checkpoints; the last iteration always saves
    resume: bool = False                # go on from this stage's checkpoint in out_dir
    overwrite: bool = False             # replace this stage's checkpoint in out_dir
    skip_bad: bool = False              # count rows of --data that cannot be read instead of stopping at the first
    tensorboard: bool = False           # write the metrics to out_dir/tensorboard, too (pip install tensorboard)
    wandb: bool = False                 # send the metrics to Weights & Biases, too (pip install wandb)

    # What a value may be: the allowed words, or an interval for numbers.
    DOMAINS: ClassVar[dict] = {
        "device": ("auto", "cpu", "cuda"), "dtype": ("auto", "float32", "bfloat16"), "seed": "[0, 9e18]",
        "max_iters": "[1, inf)", "batch_size": "[1, inf)", "micro_batch_size": "[1, inf)", "lr": "[0, inf)",
        "lr_decay_iters": "[1, inf)", "grad_clip": "(0, inf)", "max_bad_steps": "[1, inf)", "n_layer": "[1, inf)",
        "n_head": "[1, inf)", "n_embd": "[1, inf)", "block_size": "[2, inf)", "log_interval": "[1, inf)",
        "save_interval": "[1, inf)",
    }

    # What train_ppo.py hands on to the earlier stages that it runs; the rest are their own defaults.
    INHERITED: ClassVar[tuple] = ("data", "tokenizer", "out_dir", "seed", "device", "dtype", "fsdp", "recompute",
                                  "n_layer", "n_head", "n_embd", "block_size", "skip_bad", "tensorboard", "wandb")

    def check(self):
        """Raises UserError for a value outside its domain, a missing data file or package, or --resume with
        --overwrite."""
        check_domains(self)
        require(self.data == "atlas" or Path(self.data).exists(), f"--data={self.data}: No such file or directory: "
                "give a file that can be read")
        require(not (self.resume and self.overwrite), "--resume continues a checkpoint and --overwrite replaces it: "
                                                      "give one of them")
        require(distributed.joined() or not self.fsdp, "--fsdp shards a model over processes: start the script with "
                                                       "torchrun --nproc_per_node=N, or leave the flag out")
        require(not (self.fsdp and self.compile), "--fsdp and --compile have not been made to work together: leave one "
                                                  "of them out")
        n = distributed.size()
        if self.batch_size % n:  # said with the script's name: train_ppo.py asks for the stages that it will run, too
            script = Path(inspect.getsourcefile(type(self))).name
            raise UserError(f"{script} takes {self.batch_size} rows per iteration, which {n} processes cannot share "
                            f"evenly: run that script with a --batch_size that is a multiple of {n}, or start another "
                            "number of processes")
        for package in ("tensorboard", "wandb"):
            require(not getattr(self, package) or importlib.util.find_spec(package), f"--{package} needs the package "
                    f"{package}: pip install {package}, or leave the flag out")

    @property
    def folder(self):
        """Path of out_dir, the default resolved."""
        return Path(self.out_dir or Path("out") / re.sub(r"\.jsonl(\.gz)?$", "", Path(self.data).name))


def require(condition, sentence):
    if not condition:
        raise UserError(sentence)


def check_domains(config):
    """Raises UserError for a flag whose value is not one of the words, or not in the interval, of config.DOMAINS."""
    for name, domain in config.DOMAINS.items():
        value = getattr(config, name)
        if value is None:
            continue
        if isinstance(domain, tuple):
            require(value in domain, f"--{name}={value} must be one of {', '.join(domain)}")
        else:
            low, high = (float(bound) for bound in domain[1:-1].split(","))
            inside = (low <= value if domain[0] == "[" else low < value) and \
                     (value <= high if domain[-1] == "]" else value < high)  # NaN is inside nothing
            require(inside, f"--{name}={value} must lie in {domain}")


def resolve_sizes(config, model=None):
    """{n_layer, n_head, n_embd, block_size}: the flags or their defaults; with the `model` fields of a checkpoint,
    those, after a look that no flag asks for something else."""
    defaults = model or {"n_layer": 2, "n_head": 4, "n_embd": 128, "block_size": 256}
    sizes = {}
    for name in ("n_layer", "n_head", "n_embd", "block_size"):
        given = getattr(config, name)
        require(model is None or given in (None, model[name]), f"--{name}={given} does not match the checkpoint's "
                f"{name}={model and model[name]}: leave the flag out, or use another --out_dir")
        sizes[name] = defaults[name] if given is None else given
    return sizes


def flag_help(config_class):
    """{flag: trailing comment} read off the source, so that no flag is described twice."""
    comments = {}
    for cls in reversed(config_class.__mro__[:-1]):
        comments.update(re.findall(r"^    (\w+):[^#\n]*#[ ]*(.+)$", inspect.getsource(cls), re.MULTILINE))
    return comments


def parse_flags(config_class, argv=None, description=None):
    """Command line -> config_class. --lr=1e-5, --lr 1e-5, --kl-coef and --kl_coef all work, --compile is
    --compile=true, and none stands for None. Exits with code 2 and one sentence for anything else."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)

    def fail(message):
        distributed.say_alike(f"{parser.prog}: {message} (--help lists the flags)")
        raise SystemExit(2)

    parser.error = fail
    comments, hints = flag_help(config_class), get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        kinds = get_args(hints[field.name]) or (hints[field.name],)
        spellings = dict.fromkeys([f"--{field.name}", f"--{field.name.replace('_', '-')}"])
        parser.add_argument(*spellings, dest=field.name, default=field.default, metavar=kinds[0].__name__.upper(),
                            type=flag_type(kinds), help=comments[field.name].replace("%", "%%")
                            + ("" if field.default is None else f" [{field.default}]"),
                            **({"nargs": "?", "const": True} if kinds[0] is bool else {}))
    values, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].split("=")[0]
        known = [f"--{field.name}" for field in dataclasses.fields(config_class)]
        close = difflib.get_close_matches(name.replace("-", "_").replace("__", "--", 1), known, n=1)
        fail(f"unknown flag {name}" + (f", did you mean {close[0]}?" if close else ""))
    return config_class(**vars(values))


def flag_type(kinds):
    """The function that turns a flag's text into its type; kinds is (type,) or (type, NoneType)."""
    def convert(text):
        if type(None) in kinds and text.lower() == "none":
            return None
        if kinds[0] is bool:
            if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
                raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
            return text.lower() in ("true", "1", "yes")
        try:
            return kinds[0](text)
        except ValueError:
            name = {int: "whole number", float: "number"}[kinds[0]]
            raise argparse.ArgumentTypeError(f"{text!r} is not a {name}") from None
    return convert


def main(train, config_class, description, *errors):
    """What `python train_x.py --flags` does. What the user can mend (UserError and the given errors) ends in a sentence
    and code 2; numbers gone bad, a disk or another process that failed, in a sentence and code 1. Anything else is a
    bug: traceback."""
    with distributed.processes():
        config, script = parse_flags(config_class, description=description), Path(sys.argv[0]).name
        if distributed.size() > 1 and hasattr(config, "check"):  # train does it again, but each process by itself
            refusal = None
            try:
                config.check()
            except UserError as error:
                refusal = f"{script}: {error}"
            distributed.say_alike(refusal)
            if refusal:
                raise SystemExit(2)
        try:
            return train(config)
        except (UserError, *errors, FloatingPointError, OSError, RuntimeError) as error:
            if distributed.is_loss(error):
                error = f"another process is gone or cannot be reached, and may have said why ({str(error)[:120]})"
            elif isinstance(error, RuntimeError):
                raise
            process = f"process {distributed.rank()}: " if distributed.size() > 1 else ""
            sys.stderr.write(f"{script}: {process}{error}\n")  # in one piece, where several processes write
            raise SystemExit(2 if isinstance(error, (UserError, *errors)) else 1) from None


def require_one_process(what):
    """Raises UserError under torchrun, for what would do the same work in each process."""
    require(not distributed.joined(), f"{what} runs in a single process: start it without torchrun")


# ---------------------------------------------------------------------------------------------------------------------
# a reward that is a Python function of the user's

def load_reward_function(spec):
    """`path/to/file.py:function` -> the function. Raises UserError if it is not there."""
    file, _, name = spec.rpartition(":")
    require(file.endswith(".py") and name, f"--reward={spec} must be rm or path/to/file.py:function")
    require(Path(file).is_file(), f"--reward={spec}: {file} is not there")
    module_spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    require(callable(getattr(module, name, None)), f"--reward={spec}: {file} has no function {name}")
    return getattr(module, name)


def call_reward_function(function, prompts, responses):
    """The function's scores (B,), after a look that there is a finite number for each response. What the function
    raises is raised again with the prompt that it stumbled on, below the traceback into the user's file."""
    try:
        scores = function(prompts, responses)
    except Exception as error:
        where = culprit(function, prompts, responses)
        raise RuntimeError(f"the reward function raised {error!r} for {where}") from error
    require(hasattr(scores, "__len__") and len(scores) == len(responses), f"the reward function returned "
                   f"{len(scores) if hasattr(scores, '__len__') else scores!r} for {len(responses)} responses: it must "
                   "return a list of as many numbers")
    for prompt, response, score in zip(prompts, responses, scores):
        require(isinstance(score, Real) and math.isfinite(score), f"the reward function returned {score!r} for "
                       f"the prompt {prompt!r} and the response {response!r}: it must be a finite number")
    return torch.tensor([float(score) for score in scores])


def culprit(function, prompts, responses):
    """Which response makes the function raise when it is called for that one alone, in words."""
    for prompt, response in zip(prompts, responses):
        try:
            function([prompt], [response])
        except Exception:
            return f"the prompt {prompt!r} and the response {response!r}"
    return f"{len(prompts)} responses at once and for none of them alone; the first prompt is {prompts[0]!r}"


def require_finite(scores, texts):
    """scores (B,) of a reward model for texts [(prompt, response)], as they came. Raises FloatingPointError that names
    the first prompt whose score is NaN or infinite: one such score would spoil the advantages of the whole rollout."""
    for i in (~scores.isfinite()).nonzero().flatten()[:1].tolist():
        raise FloatingPointError(f"the reward model's score is {scores[i].item()} for the prompt {texts[i][0]!r} and "
                                 f"the response {texts[i][1]!r}: train it anew with a lower --lr")
    return scores


# ---------------------------------------------------------------------------------------------------------------------
# device and precision

def pick_device(config):
    """--device -> torch.device; of several processes on a machine, each takes the GPU of its local rank. Raises
    UserError if cuda was asked for and is not there, or if there are fewer GPUs than processes."""
    cuda = torch.cuda.is_available()
    require(cuda or config.device != "cuda", "--device=cuda was asked for, but torch sees no CUDA device: install a "
                                             "CUDA build of torch, or leave the flag out to run on the CPU")
    device = torch.device("cuda" if cuda and config.device != "cpu" else "cpu")
    if device.type == "cuda" and distributed.joined():
        gpus = torch.cuda.device_count()
        require(distributed.local_rank() < gpus, f"each process needs a GPU of its own and this machine has {gpus}: "
                                                 "lower --nproc_per_node")
        torch.cuda.set_device(distributed.local_rank())
    return device


def setup(config):
    """Resolves --device and --dtype, seeds torch and returns (device, autocast); use it as `with autocast():`.
    Weights and optimizer stay float32 either way: bfloat16 weights would swallow updates of RLHF's size."""
    device = pick_device(config)
    bf16 = config.dtype == "bfloat16"
    if device.type == "cuda":
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
        require(supported or not bf16, "--dtype=bfloat16 was asked for, but this GPU has none: use --dtype=float32")
        bf16 = supported and config.dtype != "float32"
        torch.set_float32_matmul_precision("high")  # TF32 for what stays float32; on a CPU float32 is exact
    else:
        keep_freed_memory()
    torch.manual_seed(config.seed)
    return device, partial(torch.autocast, device.type, dtype=torch.bfloat16, enabled=bf16)


def keep_freed_memory():
    """glibc gives a large block back to the kernel as soon as a tensor is freed, and the next one of that size pays a
    page fault for every 4 kB of it: on a CPU up to a quarter of a pass. From here on freed memory stays with this process.
    Elsewhere than on glibc this does nothing."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(-4, 0)   # M_MMAP_MAX: no block has a mapping of its own, to be unmapped
    mallopt(-1, -1)  # M_TRIM_THRESHOLD: the end of the heap is never given back


def describe(device, autocast, recompute=False):
    """One line for the screen: what --device=auto and --dtype=auto came to, and --recompute."""
    with autocast():
        dtype = "bfloat16 autocast" if torch.is_autocast_enabled(device.type) else "float32"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    processes = f"{distributed.size()} processes on " if distributed.size() > 1 else ""
    activations = ", activations recomputed" if recompute else ""
    return f"{processes}{device.type} ({name}), {dtype}{activations}, torch {torch.__version__}"


def maybe_compile(function, enabled):
    """torch.compile with dynamic shapes. Says how long the first call took, and the first with gradients, which is
    another graph. Without a working compiler it says so once and runs eagerly."""
    if not enabled:
        return function
    compiled, state, ran = torch.compile(function, dynamic=True), {"broken": False}, set()
    name = getattr(getattr(function, "func", function), "__name__", type(function).__name__)  # func: of a partial

    def call(*args, **kwargs):
        if state["broken"]:
            return function(*args, **kwargs)
        kind, began = "with gradients " if torch.is_grad_enabled() else "", time.perf_counter()
        try:
            result = compiled(*args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            state["broken"] = True
            print(f"torch.compile failed ({str(error).splitlines()[0][:120]}): going on without it")
            return function(*args, **kwargs)
        if kind not in ran:
            ran.add(kind)
            print(f"torch.compile: {name} {kind}took {time.perf_counter() - began:.1f} s at first")
        return result

    return call


def generator(device, *seeds):
    """A torch.Generator of its own for one purpose, so that no purpose disturbs another's random numbers."""
    seed = int.from_bytes(hashlib.sha256(repr(seeds).encode()).digest()[:7], "little")
    return torch.Generator(device).manual_seed(seed)


class Clock:
    """Seconds per phase. A GPU works behind the program's back, so each lap waits for it first."""

    def __init__(self, device):
        self.device, self.then = device, time.perf_counter()

    def lap(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now, then = time.perf_counter(), self.then
        self.then = now
        return now - then


# ---------------------------------------------------------------------------------------------------------------------
# the optimizer step

class Optimizer:
    """AdamW behind gradient clipping and a guard: a step whose loss or gradient is not finite is not taken.

    One NaN gradient makes clip_grad_norm_ spread NaN to all of them, and step() would then destroy every weight and
    moment, so the norm is looked at first. No weight decay: it would pull the policy away from its reference."""

    def __init__(self, params, config):
        self.params, self.config = [p for p in params if p.requires_grad], config
        self.adamw = torch.optim.AdamW(self.params, lr=config.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0,
                                       fused=self.params[0].device.type in ("cuda", "cpu"))
        self.skipped, self.skipped_in_a_row = 0, 0

    def step(self, iteration, loss):
        """Sum over processes, clip, step and clear the gradients. Returns (lr, gradient norm before clipping).
        iteration counts from 1, and loss is the number whose gradients these are, in total. Raises FloatingPointError
        after max_bad_steps steps in a row whose loss or gradient was not finite."""
        lr, loss = learning_rate(self.config, iteration), float(loss)
        distributed.sum_gradients(self.params)
        norm = distributed.whole(torch.nn.utils.clip_grad_norm_(self.params, self.config.grad_clip)).item()
        if math.isfinite(loss) and math.isfinite(norm):
            for group in self.adamw.param_groups:
                group["lr"] = lr
            self.adamw.step()
            self.skipped_in_a_row = 0
        else:
            self.skipped += 1
            self.skipped_in_a_row += 1
            print(f"iteration {iteration}: loss {loss}, gradient norm {norm}, so this optimizer step is skipped")
        self.zero_grad()
        if self.skipped_in_a_row >= self.config.max_bad_steps:
            raise FloatingPointError(f"{self.skipped_in_a_row} optimizer steps in a row had a loss or a gradient that "
                                     "is not finite: lower --lr or --grad_clip in a new run, or use --dtype=float32; "
                                     "the last checkpoint is untouched")
        return lr, norm

    def zero_grad(self):
        self.adamw.zero_grad(set_to_none=True)

    def state(self):
        return {"adamw": self.adamw.state_dict(), "skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}

    def load(self, state):
        moments = {i: {name: distributed.shard_like(value, self.params[i]) for name, value in moments.items()}
                   for i, moments in state["adamw"]["state"].items()}
        self.adamw.load_state_dict(state["adamw"] | {"state": moments})
        self.skipped, self.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]


@torch.no_grad()
def follow(average, model, iteration):
    """Moves the average's weights towards the model's: polynomial-decay averaging [Shamir & Zhang 2013, 1212.1824],
    whose memory is about the last tenth of the iterations, however many there are. The first one copies.

    Half the steps give a better language model that way, and the noise of a reward model's last steps, which hardly
    shows in its loss, makes it overrate just the answers that a policy then finds."""
    for mean, weight in zip(average.parameters(), model.parameters()):
        mean.lerp_(weight, 9 / (iteration + 8))


def learning_rate(config, iteration):
    """Constant, or falling linearly from lr to 0 over lr_decay_iters. The decay has a horizon of its own: were it
    max_iters, a run that is stopped and resumed for longer would not be the run that was never stopped."""
    if config.lr_decay_iters is None:
        return config.lr
    return config.lr * max(0.0, 1 - (iteration - 1) / config.lr_decay_iters)


def share_size(rows):
    """How many of a step's rows each process takes. Raises UserError if they cannot be shared out evenly."""
    n = distributed.size()
    require(rows % n == 0, f"{rows} rows of a step cannot be shared evenly by {n} processes: make --batch_size (for "
                           "train_ppo.py: divided by --minibatches) a multiple of their number")
    return rows // n


def micro_batch_size(rows, given, floats_per_row, by_length=False, budget=256e6):
    """Rows per forward pass, of each process's share of a step's rows: `given`, which must divide the share; or its
    largest divisor whose float32 logits (or activations, where there are no logits) stay under `budget` bytes. A
    divisor, so that all passes are alike. Where rows are sorted into passes by_length, a quarter of them or 32 at the
    most: a single pass would be as wide as the longest row of all."""
    rows = share_size(rows)
    if given is not None:
        whose = "a step" if distributed.size() == 1 else "a process in a step"
        require(rows % given == 0, f"--micro_batch_size={given} must divide the {rows} rows of {whose}: {rows} = "
                                   f"{rows // given} x {given} + {rows % given}")
        return given
    fits = max(1, int(budget / (4 * floats_per_row)))
    if by_length:
        fits = min(fits, max(32, rows // 4))
    return max(n for n in range(1, rows + 1) if rows % n == 0 and n <= fits)


# ---------------------------------------------------------------------------------------------------------------------
# files

@contextmanager
def replacing(path, previous=None):
    """A binary file to write into; once it is whole and on the disk it takes the place of `path`, whose old contents
    live on as `previous` if that is given. A crash leaves the old file or the new one, whole, under the name.
    Raises OSError that names the file if it could not be written."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if previous and Path(path).exists():
            Path(previous).unlink(missing_ok=True)
            try:
                os.link(path, previous)  # a second name, so that at no moment there is nothing under the first
            except OSError:  # some file systems have no links
                shutil.copyfile(path, previous)
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"could not write {path} ({error.strerror or error}); the file that was there is "
                      "untouched") from error
    finally:
        temporary.unlink(missing_ok=True)  # still there after a failure only, Ctrl-C among them
