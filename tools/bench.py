"""
How long one PPO iteration takes, stage by stage, and the least time it could take at this machine's measured speed.

    python -m tools.bench                                  the tiny preset, as a table
    python -m tools.bench --preset=small --dtype=bfloat16  bfloat16 autocast
    python -m tools.bench --preset=gpt2 --json             one line of JSON
    python -m tools.bench --preset=smollm2 --critic=none   SmolLM2-135M's shape; also qwen-0.6b and llama-1b
    python -m tools.bench --profile=trace.json.gz          a torch.profiler trace of one iteration, for ui.perfetto.dev
    python -m tools.bench --estimate                       which model fits into which GPU, computed and not measured

The loop is train_ppo.train itself, on random weights whose EOS is all but impossible, so that each response has its
full length. The floor is the time that the same work needs at the matrix rate and the bandwidth measured in this
process, if nothing else took any time. It is the larger of FLOPs / rate and bytes / bandwidth, per stage, and in the
rollout per decoding step. Work is counted as train_ppo.py clocks it: the reward model's pass belongs to the rollout.

tokens/s are the response tokens of a rollout divided by the stage's seconds, however often the stage passes over them.
MFU is the FLOPs of `work` / seconds / the measured matrix rate. Times are medians unless stated otherwise.
"""

import base64
import contextlib
import io
import itertools
import json
import platform
import re
import resource
import string
import sys
import tempfile
import time
import weakref
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import NamedTuple, Optional

import numpy as np
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train_ppo
from model import GPT, GPTConfig
from pretrained import LLAMA, QWEN3
from reward_model import RewardModel
from rollout import score_response, score_values
from support import metrics
from support.checkpoint import load_checkpoint, save_checkpoint
from support.device import Clock, micro_batch_size, pick_device
from support.flags import check_domains, require, run_script
from tokenizer import DataError, run_tokenizer


@dataclass
class Size:
    """The work of an iteration."""
    n_layer: int
    n_head: int
    n_embd: int
    vocab_size: int
    batch_size: int
    prompt_len: int
    response_len: int
    epochs: int = 4
    minibatches: int = 4
    kind: Optional[dict] = None  # fields of GPTConfig that are not GPT-2's

    @property
    def model(self):
        # One more position, for the EOS that the reward model is shown after a response without one.
        return GPTConfig(block_size=self.prompt_len + self.response_len + 1, vocab_size=self.vocab_size,
                         n_layer=self.n_layer, n_head=self.n_head, n_embd=self.n_embd, **self.kind or {})

    @property
    def layer(self):
        """(inputs, outputs) of a layer's four matrix products."""
        c = self.model
        return [(c.n_embd, (c.n_head + 2 * c.n_kv_head) * c.head_dim), (c.n_head * c.head_dim, c.n_embd),
                (c.n_embd, c.mlp_dim * (1 + (c.mlp == "swiglu"))), (c.mlp_dim, c.n_embd)]


PRESETS = {"tiny": Size(4, 4, 128, 512, 256, 16, 32), "small": Size(6, 6, 384, 8192, 64, 64, 64),
           "gpt2": Size(12, 12, 768, 50257, 8, 64, 32, 1, 1),
           "smollm2": Size(30, 9, 576, 49152, 16, 16, 16, 1, 2, LLAMA.kind | dict(n_kv_head=3, mlp_dim=1536)),
           "qwen-0.6b": Size(28, 16, 1024, 151936, 16, 16, 16, 1, 2, QWEN3.kind | dict(n_kv_head=8, head_dim=128,
                                                                                       mlp_dim=3072)),
           "llama-1b": Size(16, 32, 2048, 128256, 16, 16, 16, 1, 2, LLAMA.kind | dict(n_kv_head=8, mlp_dim=8192))}
ON_GPU = {"gpt2": Size(12, 12, 768, 50257, 512, 64, 128)} | {
    name: replace(PRESETS[name], batch_size=256, prompt_len=128, response_len=256, minibatches=4)
    for name in ("smollm2", "qwen-0.6b", "llama-1b")}
GPT2_XL = Size(48, 25, 1600, 50257, 64, 64, 128)
QWEN25 = LLAMA.kind | dict(n_kv_head=2, qkv_bias=True)
FITS = {name: replace(size, batch_size=64, prompt_len=128, response_len=256) for name, size in {
    "gpt2, 124M": PRESETS["gpt2"], "Qwen2.5-0.5B": Size(24, 14, 896, 151936, 0, 0, 0, kind=QWEN25 | dict(mlp_dim=4864)),
    "Qwen3-0.6B": PRESETS["qwen-0.6b"], "Llama-3.2-1B": PRESETS["llama-1b"],
    "Qwen2.5-1.5B": Size(28, 12, 1536, 151936, 0, 0, 0, kind=QWEN25 | dict(mlp_dim=8960)),
    "Llama-3.2-3B": Size(28, 24, 3072, 128256, 0, 0, 0, kind=LLAMA.kind | dict(n_kv_head=8, mlp_dim=8192))}.items()}
CARDS = 8, 12, 24, 80  # GB of a GPU
SAVING = {"`--critic=separate`": ("separate", False), "`--critic=shared`": ("shared", False),
          "`--advantage=group --recompute`": ("none", True)}  # flags: (critic, recompute), from most memory to least


@dataclass
class Config:
    preset: str = "tiny"                # tiny|small|gpt2|smollm2|qwen-0.6b|llama-1b: n_layer and later flags change it
    device: str = "auto"                # auto|cpu|cuda: auto takes cuda if there is one
    dtype: str = "auto"                 # auto|float32|bfloat16: autocast; auto is bfloat16 on cuda, float32 on cpu
    compile: bool = False               # torch.compile the training passes; give it more warm-up
    recompute: bool = False             # activation checkpointing
    critic: str = "shared"              # shared|separate|none: none is the group baseline, 4 responses to a prompt
    iters: int = 5                      # [1, inf) iterations that the medians are taken over
    warmup: int = 1                     # [0, inf) iterations before those
    json: bool = False                  # one line of JSON instead of the table
    profile: Optional[str] = None       # write a trace of one more iteration here, .json or .json.gz
    estimate: bool = False              # compute which models fit into 8, 12, 24 and 80 GB with which flags
    n_layer: Optional[int] = None       # [1, inf) layers
    n_head: Optional[int] = None        # [1, inf) attention heads
    n_embd: Optional[int] = None        # [1, inf) width
    vocab_size: Optional[int] = None    # [258, inf) token ids, 258 or more: all bytes, EOS, and words for the prompts
    batch_size: Optional[int] = None    # [1, inf) responses per rollout
    prompt_len: Optional[int] = None    # [1, inf) tokens in each prompt
    response_len: Optional[int] = None  # [1, inf) tokens in each response
    epochs: Optional[int] = None        # [1, inf) passes over a rollout
    minibatches: Optional[int] = None   # [1, inf) optimizer steps per epoch
    micro_batch_size: Optional[int] = None  # [1, inf) responses per forward pass; default: as train_ppo.py chooses

    def size(self):
        preset = ON_GPU.get(self.preset) if pick_device(self).type == "cuda" else None
        preset = asdict(preset or PRESETS[self.preset])
        size = Size(**preset | {name: getattr(self, name) for name in preset if getattr(self, name, None) is not None})
        require(size.n_embd % size.n_head == 0, f"--n_embd={size.n_embd} must be a multiple of "
                                                       f"--n_head={size.n_head}")
        return size


# ---------------------------------------------------------------------------------------------------------------------
# running train_ppo.train

def write_inputs(folder, size):
    """Writes tokens.tiktoken, prompts.jsonl, sft.pt and rm.pt: everything that train_ppo.py needs for this size."""
    letters = itertools.product(string.ascii_lowercase, repeat=4)
    words = [" " + "".join(next(letters)) for _ in range(size.vocab_size - 257)]  # each is one token: bytes, words, EOS
    ranks = [bytes([byte]) for byte in range(256)] + [word.encode() for word in words]
    (folder / "tokens.tiktoken").write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n"
                                                    for rank, token in enumerate(ranks)))
    chosen = np.random.default_rng(0).integers(0, len(words), (2 * size.batch_size + 20, size.prompt_len))
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": "".join(words[i] for i in row)}) + "\n"
                                                  for row in chosen))

    torch.manual_seed(0)
    policy = GPT(size.model)
    with torch.no_grad():
        # EOS gets a logit so low in every state that responses have their full length.
        if size.kind:  # a channel of the stream dwarfs the others, RMSNorm scales it to sqrt(C), and EOS points away
            policy.trunk.wte.weight[:, 0] = 8.0
            policy.trunk.wte.weight[-1, 0] = -8.0
        else:  # a LayerNorm's output sums to 0 before its bias, and to C with a bias of 1 everywhere
            policy.trunk.ln_f.bias.fill_(1.0)
            policy.trunk.wte.weight[-1] = -30.0 / size.n_embd
    _, tokenizer = run_tokenizer(str(folder / "tokens.tiktoken"), None)
    fields = {"model_config": asdict(size.model), "tokenizer": tokenizer, "finished": True}
    save_checkpoint(folder / "sft.pt", fields | {"stage": "sft", "model": policy.state_dict()})
    save_checkpoint(folder / "rm.pt", fields | {
        "stage": "rm", "model": RewardModel.from_policy(policy).state_dict(),
        "flags": {"max_new_tokens": size.response_len, "temperature": 1.0},
        "sources": {"sft": load_checkpoint(folder / "sft.pt", "sft")["sha256"]}})


def train_config(folder, size, **flags):
    """The flags of train_ppo.py for this size, with saving, sampling and logging put off beyond the end of the run."""
    return train_ppo.Config(**{
        "data": str(folder / "prompts.jsonl"), "init_from": str(folder / "sft.pt"), "rm": str(folder / "rm.pt"),
        "out_dir": str(folder), "batch_size": size.batch_size, "max_new_tokens": size.response_len, "lr": 1e-6,
        "epochs": size.epochs, "minibatches": size.minibatches, "max_iters": 10**6, "save_interval": 10**6,
        "sample_interval": 10**6, "log_interval": 10**6} | flags | (
            {"critic": None, "advantage": "group", "samples_per_prompt": 4} if flags.get("critic") == "none" else {}))


class Enough(Exception):
    """Raised in the loop after the last iteration that is needed."""


def run_iterations(config, after):
    """Runs train_ppo.train(config), whose loop calls after(row) with each iteration's row of metrics.jsonl, until that
    raises Enough. The rows leave out the time that `after` takes. What the run prints is shown only if it fails."""
    class Metrics(train_ppo.Metrics):
        def write(self, *args, **kwargs):
            row = super().write(*args, **kwargs)
            after(row)
            self.last = time.time()
            return row

    plain, screen = train_ppo.Metrics, io.StringIO()
    train_ppo.Metrics = Metrics
    try:
        with contextlib.redirect_stdout(screen):
            train_ppo.train(config)
    except Enough:
        pass
    except RuntimeError:
        print(screen.getvalue())
        raise
    finally:
        train_ppo.Metrics = plain


def peak_memory(device):
    """The peak in bytes: on a GPU, the allocator's; on a CPU, the whole process's, which never falls."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def measure(config, size):
    """(rows of metrics.jsonl of the timed iterations, peak memory in bytes, the text of --profile's summary)."""
    device, rows, profiler, summary = pick_device(config), [], None, ""

    def after(row):
        nonlocal profiler, summary
        if profiler:
            profiler.stop()
            profiler.export_chrome_trace(config.profile)
            order = f"self_{device.type}_time_total".replace("self_cuda", "self_device")
            summary = profiler.key_averages().table(sort_by=order, row_limit=12, max_name_column_width=40)
            raise Enough
        rows.append(row)
        if len(rows) == config.warmup + config.iters:
            if not config.profile:
                raise Enough
            profiler = torch.profiler.profile()
            profiler.start()

    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder), size)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        run_iterations(train_config(Path(folder), size, device=config.device, dtype=config.dtype,
                                    compile=config.compile, recompute=config.recompute, critic=config.critic,
                                    micro_batch_size=config.micro_batch_size), after)
    return rows[config.warmup:], peak_memory(device), summary


# ---------------------------------------------------------------------------------------------------------------------
# ceilings of the machine

def fastest(fn, device, seconds=0.3):
    """Seconds per call of fn, in the fastest of many series of calls, each long enough to be timed."""
    def timed(calls):
        clock = Clock(device)
        for _ in range(calls):
            fn()
        return clock.lap()

    timed(2)
    calls = max(1, int(5e-3 / timed(3) * 3))
    best, until = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < until:
        best = min(best, timed(calls) / calls)
    return best


def matrix_rate(size, rows, dtype, device):
    """(FLOP/s, the setting that reached it) of the fastest matrix product in a pass over `rows` sequences. float32 is
    tried with each library that torch.set_float32_matmul_precision selects, if its result has float32's precision."""
    tokens = rows * (size.prompt_len + size.response_len)
    shapes = [(tokens, *product) for product in size.layer] + [
        (rows * size.response_len, size.n_embd, size.vocab_size)]
    before, best = torch.get_float32_matmul_precision(), (0.0, "")
    settings = ("highest", "medium") if device.type == "cpu" else (before,)
    try:
        for setting in settings if dtype == torch.float32 else (before,):
            torch.set_float32_matmul_precision(setting)
            for m, k, n in shapes:
                x, w = (torch.randn(shape, device=device).to(dtype) for shape in ((m, k), (n, k)))
                error = (F.linear(x[:8], w).double() - F.linear(x[:8].double(), w.double())).norm() / (8 * n * k) ** 0.5
                if device.type == "cuda" or dtype != torch.float32 or error < 1e-5:
                    rate = 2 * m * k * n / fastest(lambda: F.linear(x, w), device)
                    best = max(best, (rate, setting if dtype == torch.float32 else "autocast"))
    finally:
        torch.set_float32_matmul_precision(before)
    return best


def bandwidth(n_bytes, device):
    """bytes/s of reading (a sum) or of copying, whichever is faster, in a working set of n_bytes, 1 GB at most.
    A small one fits into the processor's cache."""
    x = torch.zeros(int(min(n_bytes, 1e9)) // 8 * 2, device=device)
    half = x.numel() // 2
    read = fastest(x.sum, device)
    copy = fastest(lambda: x[:half].copy_(x[half:]), device)
    return x.numel() * 4 / min(read, copy)


# ---------------------------------------------------------------------------------------------------------------------
# the work, and the least time that it can take

class Piece(NamedTuple):
    """Work that cannot overlap with other pieces."""
    flops: float
    bytes: float = 0.0
    working_set: float = 0.0  # bytes that it touches again and again


def n_params(size):
    with torch.device("meta"):
        return GPT(size.model).n_params


def layer_weights(size):
    """The number of weights in a layer's matrices."""
    return sum(n * m for n, m in size.layer)


def forward_flops(size, tokens, pairs, logits):
    """FLOPs of a forward pass over `tokens`, in which attention reads `pairs` of positions and the policy head runs
    at `logits` positions. Matrix products only, 2 FLOPs for a multiplication and its addition."""
    c = size.model
    return 2 * c.n_layer * layer_weights(size) * tokens + 4 * c.n_layer * c.n_head * c.head_dim * pairs \
        + 2 * c.n_embd * c.vocab_size * logits


def work(size, critic, width):
    """{stage: [Piece]} of one iteration. `width` is the bytes per number in the products: 4 or 2."""
    B, P, R, c = size.batch_size, size.prompt_len, size.response_len, size.model
    T, critics = P + R, int(critic == "separate")
    weights = width * (size.n_layer * layer_weights(size) + size.vocab_size * size.n_embd)
    kv = width * c.cache_size * B  # per position
    trunk, scored_tokens = (forward_flops(size, B * n, B * n * (n + 1) / 2, 0) for n in (T, T + 1))
    scored = forward_flops(size, B * T, B * T * (T + 1) / 2, B * R)
    prefill = Piece(forward_flops(size, B * P, B * P * (P + 1) / 2, B), weights, weights)
    decode = [Piece(forward_flops(size, B, B * (P + t), B), weights + kv * (P + t), weights + kv * T)
              for t in range(1, R)]
    trained = n_params(size) * (1 + critics)
    adamw = Piece(0, 28 * trained, 16 * trained)  # float32: reads weight, gradient and two moments, writes three
    return {"rollout": [prefill, *decode, Piece(scored_tokens)],
            "score": [Piece(2 * scored + critics * trunk)],
            "update": [Piece(3 * size.epochs * (scored + critics * trunk))]
            + [adamw] * (size.epochs * size.minibatches)}


def floor_seconds(pieces, rate, bandwidth_at):
    """The least time for the pieces at `rate` FLOP/s and bandwidth_at(working_set) bytes/s."""
    return sum(max(piece.flops / rate, piece.bytes / bandwidth_at(piece.working_set) if piece.bytes else 0.0)
               for piece in pieces)


# ---------------------------------------------------------------------------------------------------------------------
# memory, computed

class LiveBytes(TorchDispatchMode):
    """Records, while it is active, `peak`: the most bytes held at one time by tensors that operations made."""

    def __init__(self):
        super().__init__()
        self.live, self.peak = {}, 0  # {id of a storage: its bytes}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        given, made = ([x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]
                       for tree in ((args, kwargs), out))
        for storage in made:
            if id(storage) not in self.live and not any(storage is other for other in given):  # else a view
                self.live[id(storage)] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, id(storage))
        self.peak = max(self.peak, sum(self.live.values()))
        return out


def pass_bytes(size, rows, bf16, critic=False, recompute=False, chunk=None):
    """The most bytes that a training pass over `rows` responses, forward and backward, holds beyond weights and
    gradients. Adds up the allocations of score_response itself, on fake tensors, which take no memory."""
    with FakeTensorMode():
        model, live = GPT(size.model).eval(), LiveBytes()
        model.trunk.recompute = recompute
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        tokens = torch.zeros(rows, size.prompt_len + size.response_len, dtype=torch.long)
        lens = torch.full((rows,), size.prompt_len)
        with live:
            # float16 is as wide as bfloat16, and has the fused attention here that bfloat16 has on a GPU only
            with torch.autocast("cpu", dtype=torch.float16, enabled=bf16):
                logprobs, values, _ = score_response(model, tokens, lens, size.response_len, entropy=False, chunk=chunk)
                if critic:
                    values = score_values(model, tokens, lens, size.response_len)
            (logprobs.sum() + values.sum()).backward()
        return live.peak


def estimate(size, critic, micro, bf16, recompute=False, chunk=None):
    """{what: bytes} of a run on one device. All of it is held at the same time, except that the rollout and the update
    alternate: only the larger of their peaks counts."""
    N, T = n_params(size), size.prompt_len + size.response_len
    trained = 1 + int(critic == "separate")
    kv = size.model.cache_size * T * size.batch_size * (2 if bf16 else 4)
    with torch.device("meta"):
        linear = [p.numel() for part in GPT(size.model).modules() if isinstance(part, torch.nn.Linear)
                  for p in part.parameters()]
    frozen = 4 * N - 2 * sum(linear) * bf16  # support.device.hold_frozen, which also copies a tied head
    head = size.n_embd * size.vocab_size * size.model.tied
    items = {"weights": 4 * N * trained, "gradients": 4 * N * trained, "AdamW": 8 * N * trained,
             "reference": frozen + 2 * head * bf16, "reward model": frozen}
    return items | {"KV cache": kv,
                    "training pass": pass_bytes(size, micro, bf16, critic == "separate", recompute, chunk)}


# ---------------------------------------------------------------------------------------------------------------------
# showing

def machine(device):
    """The machine that the numbers were measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return f"{name[1] if name else platform.machine()}, {torch.get_num_threads()} threads"


def bench(config):
    """Runs and measures: everything that the table and the JSON line show, as a dict."""
    check_domains(config)
    size, device = config.size(), pick_device(config)
    rows, peak, summary = measure(config, size)  # before the ceilings, whose buffers would count as memory
    bf16 = config.dtype == "bfloat16" or config.dtype == "auto" and device.type == "cuda"
    logits = size.response_len * size.vocab_size if device.type == "cpu" else 1  # a GPU has room for all rows
    micro = micro_batch_size(size.batch_size // size.minibatches, config.micro_batch_size, logits, by_length=True)
    rate, setting = matrix_rate(size, micro, torch.bfloat16 if bf16 else torch.float32, device)
    bandwidths = {}

    def bandwidth_at(working_set):
        if working_set not in bandwidths:
            bandwidths[working_set] = bandwidth(working_set, device)
        return bandwidths[working_set]

    seconds = {stage: median(row[f"sec_{stage}"] for row in rows) for stage in ("rollout", "score", "update")}
    seconds["iter"] = median(row["seconds"] for row in rows)
    pieces = work(size, config.critic, 2 if bf16 else 4)
    floors = {stage: floor_seconds(part, rate, bandwidth_at) for stage, part in pieces.items()}
    floors["iter"] = sum(floors.values())
    flops = sum(piece.flops for part in pieces.values() for piece in part)
    tokens = median(row["response_len"] for row in rows) * size.batch_size
    return {"size": size, "device": device, "dtype": "bfloat16" if bf16 else "float32", "rows": rows, "tokens": tokens,
            "rate": rate, "setting": setting, "bandwidths": bandwidths, "seconds": seconds, "floors": floors,
            "mfu": flops / seconds["iter"] / rate, "peak": peak, "summary": summary,
            "update_mfu": sum(piece.flops for piece in pieces["update"]) / seconds["update"] / rate,
            "decoding": floor_seconds(pieces["rollout"][1:-1], rate, bandwidth_at) / seconds["rollout"]}


def json_line(config, result):
    seconds = {f"sec_{name}": round(value, 4) for name, value in result["seconds"].items()}
    return json.dumps({"preset": config.preset, "device": machine(result["device"]), "dtype": result["dtype"],
                       **seconds, "floor_sec": round(result["floors"]["iter"], 4),
                       "tokens_per_s": round(result["tokens"] / result["seconds"]["iter"], 1),
                       "mfu": round(result["mfu"], 4), "update_mfu": round(result["update_mfu"], 4),
                       "decoding": round(result["decoding"], 4), "peak_memory_gb": round(result["peak"] / 1e9, 3)})


def print_table(config, result):
    size, device, seconds, floors = (result[name] for name in ("size", "device", "seconds", "floors"))
    header = metrics.header(config, "bench")
    print(f"{config.preset}: {size.n_layer} layers, {size.n_head} heads, {size.n_embd} wide, {size.vocab_size:,} ids; "
          f"{size.batch_size} responses, prompt {size.prompt_len}, response {size.response_len}; {size.epochs} epochs "
          f"x {size.minibatches} minibatches; {config.critic} critic")
    print(f"{machine(device)}, {result['dtype']}, torch {header['torch']}, commit {header['commit']}, "
          f"{time.strftime('%Y-%m-%d')}; medians of {config.iters} iterations after {config.warmup}, mean response "
          f"{result['tokens'] / size.batch_size:.1f} tokens")
    speeds = [f"{speed / 1e9:.0f} GB/s in {n / 1e6:,.0f} MB" for n, speed in sorted(result["bandwidths"].items())]
    print(f"ceilings: {result['rate'] / 1e9:,.0f} GFLOP/s {result['dtype']} ({result['setting']}), {', '.join(speeds)}")
    print(f"\n{'stage':<10}{'seconds':>9}{'lowest':>9}{'highest':>9}{'tokens/s':>10}{'floor':>9}{'ratio':>7}")
    for stage, name in (("rollout", "sec_rollout"), ("score", "sec_score"), ("update", "sec_update"),
                        ("iter", "seconds")):
        values = [row[name] for row in result["rows"]]
        print(f"{stage:<10}{seconds[stage]:>9.3f}{min(values):>9.3f}{max(values):>9.3f}"
              f"{result['tokens'] / seconds[stage]:>10,.0f}{floors[stage]:>9.3f}{seconds[stage] / floors[stage]:>7.2f}")
    print(f"\nMFU {result['mfu']:.1%} of the measured rate, the update's {result['update_mfu']:.1%}; decoding at least "
          f"{result['decoding']:.1%} of its bound; peak memory {result['peak'] / 1e9:.2f} GB"
          + (" of the whole process" if device.type == "cpu" else ""))


def gigabytes(size, critic, recompute):
    """The least GB that a run in bfloat16 needs, with --reward=FUNCTION and 4 responses per forward pass. The rollout
    and the update alternate, so only the larger of them counts."""
    items = estimate(size, critic, 4, True, recompute, chunk=256)
    rollout = items.pop("KV cache") + 2 * n_params(size)  # and the bfloat16 copy of the weights that autocast keeps
    return (sum(items.values()) - items["training pass"] - items["reward model"]
            + max(rollout, items["training pass"])) / 1e9


def print_estimate():
    """Prints which flags make which model fit into which GPU. A tenth of it is left to CUDA and to fragmentation."""
    print("computed from allocations, not measured: 64 responses of 256 tokens to prompts of 128, bfloat16 autocast "
          "over float32 weights,\n4 responses per forward pass, head in chunks of 256 positions, --reward=FUNCTION; GB "
          "needed in brackets\n\n| model | " + " | ".join(f"{card} GB" for card in CARDS) + " |\n" + "|---" * 5 + "|")
    for name, size in FITS.items():
        needs = {flags: gigabytes(size, *options) for flags, options in SAVING.items()}
        cells = [next((f"{flags} ({need:.1f})" for flags, need in needs.items() if need <= 0.9 * card), "no")
                 for card in CARDS]
        print(f"| {name} | " + " | ".join(cells) + " |")


def main(config):
    check_domains(config)
    if config.estimate:
        require(config == Config(estimate=True), "--estimate computes one table: leave its other flags out")
        return print_estimate()
    result = bench(config)
    if config.json:
        print(json_line(config, result))
    else:
        print_table(config, result)
    if config.profile:
        print(f"{result['summary']}\nwrote {config.profile}", file=sys.stderr if config.json else sys.stdout)


if __name__ == "__main__":
    run_script(main, Config, __doc__, DataError)
