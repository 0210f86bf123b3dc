"""
Device and precision: where tensors live, how passes are run (bfloat16, torch.compile, rows per pass), seeded
generators, and a clock that waits for the GPU.
"""

import ctypes
import hashlib
import time
from dataclasses import replace
from functools import cache, partial

import torch

from support import distributed
from support.flags import require


def pick_device(config):
    """--device -> torch.device. With several processes on a machine, each takes the GPU of its local rank. Raises
    UserError if cuda was asked for and is not there, or if there are fewer GPUs than processes."""
    cuda = torch.cuda.is_available()
    require(cuda or config.device != "cuda", "--device=cuda was asked for, but torch sees no CUDA device: install a "
                                             "CUDA build of torch, or leave the flag out to run on the CPU")
    device = torch.device("cuda" if cuda and config.device != "cpu" else "cpu")
    if device.type == "cuda" and distributed.is_distributed():
        gpus = torch.cuda.device_count()
        require(distributed.local_rank() < gpus, f"each process needs its own GPU and this machine has {gpus}: "
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
        require(supported or not bf16, "--dtype=bfloat16 was asked for, but this GPU does not support it: "
                                       "use --dtype=float32")
        bf16 = supported and config.dtype != "float32"
        # TF32 keeps 11 bits of each factor, as float16 does. Next to bfloat16 that loses nothing, but if you ask for
        # float32 by name, you get full float32. A CPU computes in full float32 by default.
        torch.set_float32_matmul_precision("highest" if config.dtype == "float32" else "high")
    else:
        keep_freed_memory()
        if bf16 and lacks_bfloat16(getattr(torch.cpu, "get_capabilities", dict)()):  # older torch has no such query
            note_slow_bfloat16()
    torch.manual_seed(config.seed)
    return device, partial(torch.autocast, device.type, dtype=torch.bfloat16, enabled=bf16)


def lacks_bfloat16(capabilities):
    """Whether torch.cpu.get_capabilities() says that the CPU has no instructions for bfloat16. False if it does not
    say."""
    known = [has for name, has in capabilities.items() if "bf16" in name or name == "avx_ne_convert"]
    return bool(known) and not any(known)


@cache
def note_slow_bfloat16():
    """Printed once, however many stages a process runs."""
    print("note: this CPU has no instructions for bfloat16, so --dtype=bfloat16 is much slower here than float32: "
          "leave the flag out")


def keep_freed_memory():
    """Keeps freed memory in this process if the C library is glibc; otherwise this is a no-op. glibc gives a large
    block back to the kernel as soon as a tensor is freed. The next tensor of that size then pays a page fault for
    every 4 kB: on a CPU, up to a quarter of a pass's time."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(-4, 0)   # M_MMAP_MAX: no block gets a mapping that free() would unmap
    mallopt(-1, -1)  # M_TRIM_THRESHOLD: the end of the heap is never given back


def describe(device, autocast, recompute=False):
    """One line for the screen: device and precision as resolved, and --recompute."""
    with autocast():
        dtype = "bfloat16 autocast" if torch.is_autocast_enabled(device.type) else "float32"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    processes = f"{distributed.size()} processes on " if distributed.size() > 1 else ""
    activations = ", activations recomputed" if recompute else ""
    return f"{processes}{device.type} ({name}), {dtype}{activations}, torch {torch.__version__}"


def maybe_compile(fn, enabled):
    """fn under torch.compile with dynamic shapes if enabled, else fn. Prints how long the first call took, and the
    first call with gradients, which compiles another graph. Without a working compiler, says so once and runs eagerly.
    """
    if not enabled:
        return fn
    compiled, state, ran = torch.compile(fn, dynamic=True), {"broken": False}, set()
    name = getattr(getattr(fn, "func", fn), "__name__", type(fn).__name__)  # func: a partial's function

    def call(*args, **kwargs):
        if state["broken"]:
            return fn(*args, **kwargs)
        kind, began = "with gradients " if torch.is_grad_enabled() else "", time.perf_counter()
        try:
            result = compiled(*args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            state["broken"] = True
            print(f"torch.compile failed ({str(error).splitlines()[0][:120]}): running without it")
            return fn(*args, **kwargs)
        if kind not in ran:
            ran.add(kind)
            print(f"torch.compile: {name} {kind}took {time.perf_counter() - began:.1f} s at first")
        return result

    return call


def hold_frozen(autocast, device, *modules):
    """Rounds the matrices of frozen models (or None) once, as autocast would in each pass. The results stay the same to
    the bit, a weight takes 2 bytes less, and passes skip the rounding. Norms and embeddings stay float32, so a head
    that is tied to the embeddings becomes a copy. Without autocast, and on shards, this is a no-op."""
    with autocast():
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    for module in filter(None, modules):
        if dtype and not any(map(distributed.is_sharded, module.parameters())):
            if hasattr(module, "policy_head") and module.config.tied:
                module.config, module.lm_head = replace(module.config, tied=False), torch.nn.Linear(1, 1, bias=False)
                module.lm_head.weight = torch.nn.Parameter(module.trunk.wte.weight.detach().to(dtype), False)
            for part in module.modules():
                if isinstance(part, torch.nn.Linear):
                    part.to(dtype)


CPU_BUDGET = 256e6  # bytes of a pass's float32 logits on a CPU
FEWEST_ROWS = 4     # fewer rows than this are too little work for a pass


def micro_batch_size(rows, given, floats_per_row, by_length=False, budget=CPU_BUDGET):
    """Rows per forward pass, of each process's shard of a step's rows. It is `given`, which must divide the shard, or
    the largest divisor whose float32 logits (or activations, if there are no logits) stay under `budget` bytes. With a
    divisor, all passes have the same size. If rows are sorted by_length, a pass takes at most a quarter of them, or 32
    if that is more: a single pass would be as wide as the longest row of all. Raises UserError."""
    n = distributed.size()
    require(rows % n == 0, f"{rows} rows of a step cannot be shared evenly by {n} processes: make --batch_size (for "
                           "train_ppo.py: divided by --minibatches) a multiple of their number")
    rows //= n
    if given is not None:
        whose = "a step" if n == 1 else "a process in a step"
        require(rows % given == 0, f"--micro_batch_size={given} must divide the {rows} rows of {whose}: {rows} = "
                                   f"{rows // given} x {given} + {rows % given}")
        return given
    fits = max(1, int(budget / (4 * floats_per_row)))
    if by_length:
        fits = min(fits, max(32, rows // 4))
    return max(n for n in range(1, rows + 1) if rows % n == 0 and n <= fits)


def spare_memory(device, *modules):
    """Bytes on a GPU for one forward and backward pass, None on a CPU. It is half of what is free once the trained
    weights of the modules have gradients and AdamW's moments. All processes get the smallest of their values, because
    their passes must have the same size."""
    if device.type == "cpu":
        return None
    torch.cuda.empty_cache()  # what earlier stages left
    trained = sum(distributed.local_numel(p) for module in modules for p in module.parameters() if p.requires_grad)
    free = torch.cuda.mem_get_info(device)[0] - 12 * trained
    return -float(distributed.all_reduce_max(-free)[0]) / 2


def activations(config, T, recompute=False):
    """Numbers per row of T tokens that live until the backward pass: about 16 per token, layer and channel. With
    --recompute it is 1, plus the 16 of a single layer."""
    return T * config.n_embd * (config.n_layer + 16 if recompute else 16 * config.n_layer)


def rows_and_chunk(rows, given, logits, activations, spare, by_length=False, copies=3):
    """(micro_batch_size, chunk): chunk is how many positions the policy head reads at a time, None for all of a pass.

    `logits` is (R, V), `activations` is for one row, `spare` is from spare_memory. On a GPU a row takes its activations
    and `copies` of its float32 logits: 3 in a training pass, 5 with the entropy. On a CPU only the logits are counted.
    The head reads chunks if whole logits would leave fewer than FEWEST_ROWS rows for a pass."""
    (R, V), budget = logits, spare or 4 * CPU_BUDGET
    whole, limit = (R * V, CPU_BUDGET) if spare is None else (activations + copies * R * V, spare)
    in_chunks = micro_batch_size(rows, given, activations, by_length, budget)
    if limit / (4 * whole) >= min(FEWEST_ROWS, in_chunks):
        return micro_batch_size(rows, given, whole, by_length, limit), None
    return in_chunks, max(1, int(min(budget / 4, 2e9) / (3 * 4 * V)))


def generator(device, *seeds):
    """A torch.Generator for one purpose, so that no purpose disturbs another's random numbers."""
    seed = int.from_bytes(hashlib.sha256(repr(seeds).encode()).digest()[:7], "little")
    return torch.Generator(device).manual_seed(seed)


class Clock:
    """Seconds per phase. A GPU works asynchronously, so each lap waits for it first."""

    def __init__(self, device):
        self.device, self.then, self.seconds = device, time.perf_counter(), {}

    def lap(self, phase=None):
        """Seconds since the previous lap, also stored in `seconds` under the phase's name if one is given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now, then = time.perf_counter(), self.then
        self.then = now
        if phase:
            self.seconds[phase] = now - then
        return now - then
