"""
Command-line flags: one dataclass field per flag. The field's trailing comment is its domain and its --help, so that a
flag, its default, its domain and its explanation are in one place.
"""

import argparse
import dataclasses
import difflib
import errno
import importlib.util
import inspect
import os
import re
import stat
import sys
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Optional, get_args, get_type_hints

from support import distributed


class UserError(ValueError):
    """A wrong flag, file or combination: one sentence for the person at the keyboard, exit code 2."""


def require(condition, sentence):
    if not condition:
        raise UserError(sentence)


# ---------------------------------------------------------------------------------------------------------------------
# the flags that every train script has

@dataclass
class Flags:
    """Scripts add flags and set other defaults. A comment may begin with the domain: an interval, or words with bars
    between them. A comment line by itself is the heading of a group in --help."""
    # data and files
    data: str = "atlas"                 # atlas (built in), or a .jsonl / .jsonl.gz file
    tokenizer: Optional[str] = None     # atlas, bytes, a tiktoken name, .tiktoken or tokenizer.json; default: a model's
    chat: Optional[str] = None          # chatml|llama3|plain|none: message format; default: by the tokenizer's tokens
    out_dir: Optional[str] = None       # checkpoints and metrics.jsonl go here; default: out/<data>
    init_from: Optional[str] = None     # where the weights start from
    skip_bad: bool = False              # count unreadable rows of --data instead of stopping at the first
    resume: bool = False                # continue from this stage's checkpoint in out_dir
    overwrite: bool = False             # replace this stage's checkpoint in out_dir
    save_interval: int = 100            # [1, inf) iterations between checkpoints; the last iteration always saves
    log_interval: int = 10              # [1, inf) iterations between lines on the screen; metrics.jsonl gets every one
    tensorboard: bool = False           # write the metrics to out_dir/tensorboard, too (pip install tensorboard)
    wandb: bool = False                 # send the metrics to Weights & Biases, too (pip install wandb)
    # a model from scratch
    arch: Optional[str] = None          # gpt2|llama: kind of transformer; default gpt2, or the checkpoint's
    n_layer: Optional[int] = None       # [1, inf) layers; default 2, or the checkpoint's
    n_head: Optional[int] = None        # [1, inf) attention heads; default 4, or the checkpoint's
    n_embd: Optional[int] = None        # [1, inf) width; default 128, or the checkpoint's
    block_size: Optional[int] = None    # [2, inf) longest prompt + response; default 256, or the checkpoint's
    # optimizer
    max_iters: int = 0                  # [1, inf) iterations of this stage
    batch_size: int = 0                 # [1, inf) rows per iteration, of all processes together
    lr: Optional[float] = None          # [0, inf) AdamW's learning rate
    lr_decay_iters: Optional[int] = None  # [1, inf) lower lr linearly to 0 over this many iterations; default: constant
    grad_clip: float = 1.0              # (0, inf) gradients of a larger norm are scaled down to it
    max_bad_steps: int = 3              # [1, inf) stop after this many steps in a row with a non-finite gradient
    # machine
    seed: int = 0                       # [0, 9e18] everything random follows from it; PPO seeds differ: report several
    device: str = "auto"                # auto|cpu|cuda: auto takes cuda if there is one
    dtype: str = "auto"                 # auto|float32|bfloat16: auto: bfloat16 on cuda, else float32; float32: no TF32
    compile: bool = False               # torch.compile the training passes; the first iterations then take minutes
    micro_batch_size: Optional[int] = None  # [1, inf) rows per forward pass; lower it when memory runs out
    recompute: bool = False             # activation checkpointing: less memory per row, for a third more arithmetic
    fsdp: bool = False                  # under torchrun: shard parameters and AdamW's moments over the processes

    # Flags that train_ppo.py passes to the earlier stages it runs. Other flags keep those stages' own defaults.
    INHERITED: ClassVar[tuple] = ("data", "tokenizer", "chat", "out_dir", "seed", "device", "dtype", "fsdp",
                                  "recompute", "arch", "n_layer", "n_head", "n_embd", "block_size", "skip_bad",
                                  "max_new_tokens", "temperature", "tensorboard", "wandb")

    given: ClassVar[frozenset] = frozenset()  # the names of the flags that the command line gave

    def replace(self, **changes):
        """A copy with other values."""
        config = dataclasses.replace(self, **changes)
        config.given = self.given
        return config

    def check(self):
        """Raises UserError for a value outside its domain, a missing data file or package, or flags at odds."""
        check_domains(self)
        reason = "" if self.data == "atlas" else why_unreadable(self.data)
        require(not reason, f"--data={self.data}: {reason}: give a file that can be read")
        require(not (self.resume and self.overwrite), "--resume continues a checkpoint and --overwrite replaces it: "
                                                      "give one of them")
        require((self.lr_decay_iters or self.max_iters) >= self.max_iters, f"--lr_decay_iters={self.lr_decay_iters} "
                f"lowers lr to 0 before --max_iters={self.max_iters}: give that many or more"
                + (", or a lower --max_iters" if self.resume else ""))
        require(distributed.is_distributed() or not self.fsdp, "--fsdp shards a model over processes: start the script "
                "with torchrun --nproc_per_node=N, or leave the flag out")
        require(not (self.fsdp and self.compile), "--fsdp and --compile have not been made to work together: leave one "
                                                  "of them out")
        n = distributed.size()
        if self.batch_size % n:  # the script's name is in the sentence, because train_ppo.py checks earlier stages, too
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


def why_unreadable(path):
    """Why a file cannot be read, mostly in the operating system's words; "" if it can. It is not opened, which would
    use up a pipe."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        return error.strerror
    if stat.S_ISDIR(mode):
        return os.strerror(errno.EISDIR)
    if not stat.S_ISREG(mode):
        return "Not a file but a pipe or a device, and a run reads its data several times"
    return "" if os.access(path, os.R_OK) else os.strerror(errno.EACCES)


# ---------------------------------------------------------------------------------------------------------------------
# reading the comments

FIELD = re.compile(r"^    (\w+):(?! ClassVar)[^#\n]*#[ ]*"
                   r"(?:([\[(][^\])]*[\])]) |([\w.-]+(?:\|[\w.-]+)+)(?=[:;,]|$))?(.*)$")
HEADING = re.compile(r"^    # ([^.]+)$")


def describe_flags(config_class):
    """{flag: (domain, help)}, and [(heading, [flags])] in the order of the source: a script's own flags, then those it
    inherits. The domain is a text such as "[0, 1]", a tuple of words, or None."""
    described, groups = {}, []
    for cls in config_class.__mro__[:-1]:
        sections = [("", [])]
        for line in inspect.getsource(cls).splitlines():
            if heading := HEADING.match(line):
                sections.append((heading[1], []))
            elif (field := FIELD.match(line)) and field[1] not in described:
                name, interval, words, text = field.groups()
                described[name] = (tuple(words.split("|")) if words else interval,
                                   (f"{interval} " if interval else "") + text.lstrip(":;, "))
                sections[-1][1].append(name)
        groups += [group for group in sections if group[1]]
    return described, groups


def check_domains(config):
    """Raises UserError for a flag whose value is not among the words or in the interval that its comment gives."""
    for name, (domain, _) in describe_flags(type(config))[0].items():
        value = getattr(config, name)
        if value is None or domain is None:
            continue
        if isinstance(domain, tuple):
            require(value in domain, f"--{name}={value} must be one of {', '.join(domain)}")
        else:
            low, high = (float(bound) for bound in domain[1:-1].split(","))
            inside = (low <= value if domain[0] == "[" else low < value) and \
                     (value <= high if domain[-1] == "]" else value < high)  # NaN is in no interval
            require(inside, f"--{name}={value} must lie in {domain}")


def refuse_given(config, names, why):
    """Raises UserError for the first of these flags that was given on the command line, or does not have its default:
    it would do nothing in this run."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name in names:
        value = getattr(config, name)
        require(value == defaults[name] and name not in config.given, f"--{name}={value} would do nothing {why}: leave "
                "it out")


def check_ppo(config):
    """Raises UserError for flags of train_ppo.py that are wrong, at odds, or without effect together."""
    require(config.kl_kind != "k1", "--kl_kind=k1 in the loss does nothing: the expected gradient of log pi - log "
                                    "pi_ref over the policy's own samples is zero; use k2 or k3")
    Flags.check(config)
    B, n, k = config.batch_size, config.minibatches, config.samples_per_prompt
    if config.advantage == "group":
        refuse_given(config, ("critic", "vf_coef", "value_clip", "lam"), "with --advantage=group")
        require(k > 1, "--advantage=group compares the responses to a prompt with each other: set "
                       "--samples_per_prompt to 2 or more")
    require(B % k == 0, f"--batch_size={B} must be a multiple of --samples_per_prompt={k}")
    require(B % n == 0, f"--batch_size={B} must be a multiple of --minibatches={n}, but {B} = {n} x {B // n} + {B % n}")
    require(config.kl_in == "loss" or config.kl_kind is None, "--kl_kind is for --kl_in=loss; in the reward the KL is "
            "always k1, the only one with the right gradient there")
    require(config.kl_target is None or config.kl_coef > 0, "--kl_target steers by multiplying kl_coef, so --kl_coef=0 "
            "would stay 0: give a start above 0")
    require(config.eval != "rm", "--eval=rm: the reward model's score on held-out prompts is always logged, as "
            "score_heldout: leave the flag out, or name path/to/file.py:function")
    require(config.reward == "rm" or config.rm is None, "--rm names a reward model, but --reward names a function: "
            "give one of them")


def resolve_sizes(config, model=None):
    """{n_layer, n_head, n_embd, block_size}: the flags if given, else the fields of a checkpoint's `model`, or defaults
    without one. Raises UserError if a flag asks for another size than the checkpoint's. With RoPE, a lower block_size
    is allowed."""
    rope = model is not None and model.get("position") == "rope"
    arch = "llama" if rope else "gpt2"
    require(model is None or config.arch in (None, arch), f"--arch={config.arch} does not match the checkpoint, which "
            f"is a {arch}: leave the flag out, or use another --out_dir")
    defaults = model or {"n_layer": 2, "n_head": 4, "n_embd": 128, "block_size": 256}
    sizes = {}
    for name in ("n_layer", "n_head", "n_embd", "block_size"):
        given = getattr(config, name)
        fits = model is None or given in (None, model[name]) or name == "block_size" and rope and given < model[name]
        require(fits, f"--{name}={given} does not match the checkpoint's "
                f"{name}={model and model[name]}: leave the flag out, or use another --out_dir")
        sizes[name] = defaults[name] if given is None else given
    return sizes


# ---------------------------------------------------------------------------------------------------------------------
# the command line

def parse_flags(config_class, argv=None, description=None):
    """Command line -> config_class. --lr=1e-5, --lr 1e-5, --kl-coef and --kl_coef all work, --compile is
    --compile=true, and none means None. Exits with code 2 and one sentence for anything else."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False, usage="%(prog)s [--flag=value ...]",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)

    def fail(message):
        distributed.print_once(f"{parser.prog}: {message} (--help lists the flags)")
        raise SystemExit(2)

    parser.error = fail
    fields, hints = {field.name: field for field in dataclasses.fields(config_class)}, get_type_hints(config_class)
    described, groups = describe_flags(config_class)
    for heading, names in groups:
        group = parser.add_argument_group(heading or "flags")
        for name in names:
            kinds, default = get_args(hints[name]) or (hints[name],), fields[name].default
            domain, text = described[name]
            kinds = kinds[:1] if isinstance(domain, tuple) and "none" in domain else kinds  # here "none" is a word
            metavar = "|".join(domain) if isinstance(domain, tuple) else kinds[0].__name__.upper()
            group.add_argument(f"--{name}", dest=name, default=argparse.SUPPRESS, metavar=metavar,
                               type=flag_type(kinds), help=text.replace("%", "%%")
                               + ("" if default is None else f" (default {default})"),
                               **({"nargs": "?", "const": True} if kinds[0] is bool else {}))
    argv = [re.sub(r"^--[\w-]+", lambda m: "--" + m[0][2:].replace("-", "_"), arg)
            for arg in (sys.argv[1:] if argv is None else argv)]
    values, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].split("=")[0]
        close = difflib.get_close_matches(name, [f"--{field}" for field in fields], n=1)
        fail(f"unknown flag {name}" + (f", did you mean {close[0]}?" if close else ""))
    config = config_class(**vars(values))
    config.given = set(vars(values))
    return config


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


class Screen:
    """stdout or stderr, which must not end a run. A character that its encoding lacks is escaped. Once it cannot be
    written any more (`| head` has read enough), the run continues without it."""

    def __init__(self, stream):
        self.stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        return self.attempt(self.stream.write, text)

    def flush(self):
        self.attempt(self.stream.flush)

    def attempt(self, action, *args):
        try:
            return action(*args)
        except OSError as error:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())  # what is still in the buffer goes there, too
            os.close(nowhere)
            if sys.stdout is self:
                sys.stderr.write(f"note: stdout cannot be written any more ({error.strerror}): continuing without it\n")


@contextmanager
def screen():
    """Makes stdout and stderr Screens inside the block. In a Python without a console they are None."""
    streams = [stream and Screen(stream) for stream in (sys.stdout, sys.stderr)]
    with redirect_stdout(streams[0]), redirect_stderr(streams[1]):
        try:
            yield
        finally:
            for stream in filter(None, streams):
                stream.flush()


def run_script(train, config_class, description, *errors):
    """Runs `python train_x.py --flags`. An error that you can fix (UserError and the given errors) ends in a sentence
    and code 2. A number that is not finite, a failed disk or a lost process ends in a sentence and code 1. Anything
    else is a bug and keeps its traceback."""
    with distributed.processes(), screen():
        config, script = parse_flags(config_class, description=description), Path(sys.argv[0]).name
        if distributed.size() > 1 and hasattr(config, "check"):  # train checks again, but each process for itself
            refusal = None
            try:
                config.check()
            except UserError as error:
                refusal = f"{script}: {error}"
            distributed.print_once(refusal)
            if refusal:
                raise SystemExit(2)
        try:
            return train(config)
        except (UserError, *errors, FloatingPointError, OSError, RuntimeError) as error:
            if distributed.is_lost_peer(error):
                error = f"another process is gone or cannot be reached, and may have said why ({str(error)[:120]})"
            elif isinstance(error, RuntimeError):
                raise
            process = f"process {distributed.rank()}: " if distributed.size() > 1 else ""
            sys.stderr.write(f"{script}: {process}{error}\n")  # one write, as other processes may write too
            raise SystemExit(2 if isinstance(error, (UserError, *errors)) else 1) from None


def require_one_process(what):
    """Raises UserError under torchrun, for code that would do the same work in each process."""
    require(not distributed.is_distributed(), f"{what} runs in a single process: start it without torchrun")
