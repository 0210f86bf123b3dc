"""
A pretend GPU: tensors that say device="cuda:0", hold a CPU tensor and compute for real. What CUDA would refuse, an
operation on tensors of two devices, raises. What makes the host wait for a GPU is counted by file and line.

    python tests/pretend_cuda.py guard.so runs.json          runs.json holds [[stage, out_dir, flags], ...]
    python tests/pretend_cuda.py guard.so runs.json plant    a mistake is planted, to see it found

prints, as one line of JSON, for each run a list of {place: waits}, one for each iteration. It cannot show kernels,
numerics, speed, memory, CUDA's random numbers or nccl.
"""

import ctypes
import json
import os
import sys
from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path

HERE = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path[:0] = [str(HERE.parent), str(HERE)]
    ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)  # its registrations come too late once torch is there

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda:0")
WAITS = Counter()  # of the iteration that runs
COPIES = ("_to_copy", "copy_")
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")  # CUDA takes an index from the CPU: it copies it
READING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "is_nonzero", "equal")


def note(what):
    """Counts a wait at the innermost line of the project's code that led to it."""
    frame = sys._getframe()
    while frame and (HERE in Path(frame.f_code.co_filename).parents or not
                     frame.f_code.co_filename.startswith(f"{HERE.parent}/")):
        frame = frame.f_back
    place = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else "elsewhere"
    WAITS[f"{place} {what}"] += 1


class Pretend(torch.Tensor):
    """`held`, a CPU tensor, as it would be on the GPU."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=CUDA, requires_grad=held.requires_grad)

    def __init__(self, held):
        self.held = held

    def __repr__(self):
        return f"Pretend({self.held})"

    def __format__(self, spec):
        return format(self.item() if self.dim() == 0 else self, spec)

    def tolist(self):
        note("tolist")
        return self.held.detach().tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


class EverythingPretends(TorchDispatchMode):
    """For operations without a pretend tensor among their arguments, such as torch.zeros(3, device="cuda")."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


def compute(func, args, kwargs):
    """func on the real tensors, with what CUDA would refuse or wait for."""
    name = func.name().split("::")[1].split(".")[0]
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    ours, others = ([x for x in tensors if isinstance(x, Pretend) == pretend] for pretend in (True, False))
    device = kwargs.get("device")
    to_cuda = torch.device(device).type == "cuda" if device is not None else bool(ours)
    if ours and name not in COPIES:
        for x in others:
            if x.dim() and name not in INDEXING:
                raise RuntimeError(f"{func.name()} of tensors on a GPU and one of shape {tuple(x.shape)} on the CPU")
            if x.dim():
                note("index from the CPU")
    if ours and (name in READING or name == "index" and any(x.dtype == torch.bool for x in tensors[1:])):
        note(name)
    if name == "_to_copy" and to_cuda != bool(ours) or name == "copy_" and ours and others:
        note("copy between devices")
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    with _disable_current_modes():
        out = func(*real(args), **real(kwargs))
    if not to_cuda:
        return out
    out = tree_map(lambda x: Pretend(x) if isinstance(x, torch.Tensor) else x, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if ours and name != "_to_copy" else out


def real(tree):
    return tree_map(lambda x: x.held if isinstance(x, Pretend) else x, tree)


def demanding(attention):
    """scaled_dot_product_attention, which raises for a mask that CUDA would make another one of, in each layer."""
    def call(q, k, v, attn_mask=None, **options):
        if attn_mask is not None and (attn_mask.dtype != q.dtype or attn_mask.size(-1) % 16):
            raise RuntimeError(f"a mask of {attn_mask.size(-1)} slots in {attn_mask.dtype} for queries in {q.dtype}")
        return attention(q, k, v, attn_mask, **options)
    return call


def pretend(free=40e9):
    """Patches torch until it believes in the GPU, which has `free` bytes."""
    cuda, generator, save = torch.cuda, torch.Generator, torch.save
    cuda.is_available, cuda._lazy_init = (lambda: True), (lambda: None)
    cuda.is_bf16_supported, cuda.get_device_name = (lambda including_emulation=True: True), (lambda *device: "pretend")
    cuda.mem_get_info = lambda *device: (int(free), int(2 * free))
    cuda.synchronize = lambda *device: note("synchronize")
    cuda.get_rng_state_all, cuda.set_rng_state_all = (lambda: []), (lambda states: None)
    cuda.get_rng_state, cuda.set_rng_state = (lambda *device: torch.zeros(16, dtype=torch.uint8)), (lambda *state: None)
    cuda.manual_seed_all = lambda seed: None
    cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.Generator = type("Generator", (), {"__new__": lambda cls, device="cpu": generator("cpu")})
    F.scaled_dot_product_attention = demanding(F.scaled_dot_product_attention)
    torch.save = lambda value, file: save(real(value), file)
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # or module.to("cuda") would change .data


def run(stage, folder, flags):
    """Runs a stage to its end. Returns the waits of each iteration, up to its line of metrics.jsonl."""
    from support.metrics import Metrics
    from tiny import module_of, settings
    iterations, write = [], Metrics.write

    def count(metrics, *args):
        row = write(metrics, *args)
        iterations.append(dict(WAITS))
        WAITS.clear()
        return row

    Metrics.write = count
    try:
        module_of(stage, flags).train(settings(stage, folder, device="cuda", **flags))
    finally:
        Metrics.write = write
    return iterations


def plant():
    """Logits meet a tensor that somebody made without a device."""
    import rollout
    upcast = rollout.upcast
    rollout.upcast = lambda x: upcast(x) + torch.zeros(x.size(-1))


if __name__ == "__main__":
    torch.set_num_threads(1)
    pretend()
    if sys.argv[3:]:
        plant()
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), EverythingPretends():
        results = [run(*arguments) for arguments in json.loads(Path(sys.argv[2]).read_text())]
    print(json.dumps(results), flush=True)
    os._exit(0)  # at an ordinary exit, torch would clean up a GPU that is not there
