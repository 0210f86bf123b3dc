"""
Many processes, started by torchrun: sharding rows, gathering results, reducing metrics, sharded models. In a single
process every function here is a no-op.

    torchrun --nproc_per_node=4 train_ppo.py               the same flags; --batch_size counts all processes together
    torchrun --nproc_per_node=4 train_ppo.py --fsdp        parameters, gradients and AdamW's moments are sharded too

Every process samples, scores and trains on its shard of the rows, and holds the whole rollout: token ids and (B, R)
floats are small next to a model. So whitening, KL, GAE and the metrics are the plain functions of ppo.py on the same
tensors in every process. Every token has weight 1 / (the tokens of all processes), and the gradients are summed.
Dropout (train_sft.py) draws the same masks in each process, although the rows differ.
"""

import os
import sys
from contextlib import contextmanager, redirect_stdout
from dataclasses import is_dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist

# How long a process waits for another that is alive. A dead one is noticed at once. The others wait while the first
# writes a large checkpoint, or while one waits for a slow reward function.
TIMEOUT = timedelta(minutes=10)


# ---------------------------------------------------------------------------------------------------------------------
# the processes

@contextmanager
def processes():
    """Joins the processes that torchrun started: nccl for tensors on a GPU, gloo on a CPU. Only the first prints."""
    if not dist.is_available() or not dist.is_torchelastic_launched():
        yield
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)
    with open(os.devnull, "w") as nowhere, redirect_stdout(sys.stdout if is_first() else nowhere):
        yield
    # Only after success: a process that failed must not wait here for the others, which may wait for it.
    dist.destroy_process_group()


def is_lost_peer(error):
    """Whether an exception says that another process cannot be reached. gloo has no type for that: it raises a plain
    RuntimeError that begins with the place in its source."""
    from_gloo = type(error) is RuntimeError and "/gloo/transport/" in str(error)
    return is_distributed() and (isinstance(error, dist.DistError) or from_gloo)


def print_once(line):
    """Prints a line (or None) on stderr. All processes call this: the first prints its line, the others print theirs
    only if it differs. They wait for the first, because torchrun ends all processes when one ends."""
    if line and is_first():
        sys.stderr.write(f"{line}\n")
    if gather([line])[0] != line and line:
        sys.stderr.write(f"{line}\n")


def is_distributed():
    return dist.is_available() and dist.is_initialized()


def size():
    return dist.get_world_size() if is_distributed() else 1


def rank():
    return dist.get_rank() if is_distributed() else 0


def is_first():
    """Whether this is the process that prints, locks out_dir and writes files."""
    return rank() == 0


def local_rank():
    """Which process of its machine this one is, and so which GPU it takes."""
    return int(os.environ["LOCAL_RANK"]) if is_distributed() else 0


def per_rank(purpose):
    """A generator's purpose that differs between processes, so that equal weights sample different tokens."""
    return purpose if is_first() else f"{purpose}, process {rank()}"


# ---------------------------------------------------------------------------------------------------------------------
# rows and numbers

def shard(rows):
    """This process's rows of a tensor, a list or a record of tensors (a Rollout): a block, in order of rank."""
    if is_dataclass(rows):
        return replace(rows, **{name: shard(column) for name, column in vars(rows).items()})
    n = len(rows)
    return rows[n * rank() // size():n * (rank() + 1) // size()]


def fill_up(rows):
    """A list of rows with its first row repeated at the end, until all processes get equally many."""
    return rows + rows[:1] * (-len(rows) % size())


def gather(rows, pad=0, **pads):
    """The rows of all processes, in order of rank. A tensor has equally many rows in each process. Its columns, if any,
    are padded on the right with `pad` to the widest process. The fields of a record are padded with pads[name]."""
    if size() == 1:
        return rows
    if is_dataclass(rows):
        return replace(rows, **{name: gather(column, pads.get(name, pad)) for name, column in vars(rows).items()})
    if isinstance(rows, list):
        gathered = [None] * size()
        dist.all_gather_object(gathered, rows)
        return [row for part in gathered for row in part]
    if rows.dim() == 2:
        missing = int(all_reduce_max(rows.size(1))[0]) - rows.size(1)
        rows = torch.cat([rows, rows.new_full((rows.size(0), missing), pad)], dim=1)
    gathered = [torch.empty_like(rows) for _ in range(size())]
    dist.all_gather(gathered, rows.contiguous())
    return torch.cat(gathered)


def sum_tensor(x):
    """x summed over all processes, in place."""
    if size() > 1:
        dist.all_reduce(x)
    return x


def all_reduce_sum(*values):
    """The sum over all processes of each number, e.g. of parts of a mean."""
    return reduce(values, dist.ReduceOp.SUM)


def all_reduce_max(*values):
    """The maximum over all processes of each number."""
    return reduce(values, dist.ReduceOp.MAX)


def reduce(values, op):
    if size() == 1:
        return values
    numbers = torch.tensor([float(value) for value in values], dtype=torch.float64)
    dist.all_reduce(numbers, op)
    return numbers.unbind()


def numbers(values):
    """values with a Python float in place of each tensor. One copy fetches them all, as each copy makes the host wait.
    """
    values = list(values)
    tensors = [value.detach() for value in values if isinstance(value, torch.Tensor)]
    floats = iter(torch.stack([x.to(tensors[0].device, torch.float64) for x in tensors]).tolist() if tensors else [])
    return [next(floats) if isinstance(value, torch.Tensor) else value for value in values]


@torch.no_grad()
def sum_gradients(params):
    """Replaces each gradient by its sum over all processes, in one all_reduce. fully_shard has summed its own."""
    grads = [p.grad for p in params if p.grad is not None and not is_sharded(p)]
    if size() > 1 and grads:
        summed = torch.cat([grad.reshape(-1) for grad in grads])
        dist.all_reduce(summed)
        for grad, part in zip(grads, summed.split([grad.numel() for grad in grads])):
            grad.copy_(part.view_as(grad))


# ---------------------------------------------------------------------------------------------------------------------
# models that are sharded

def to_device(device, config, autocast, *modules):
    """Moves modules (or None) to the device. With --fsdp each process holds only a shard of each parameter, and a pass
    gathers the other parts block by block [FSDP2, torch.distributed.fsdp.fully_shard]. Under bfloat16 autocast the
    blocks' matrices are rounded before they are sent, which halves the traffic, and gradients are summed in float32.
    Sets --recompute on each module."""
    with autocast():
        bf16 = torch.is_autocast_enabled(device.type)
    for module in filter(None, modules):
        module.trunk.recompute = config.recompute
        if not config.fsdp:
            module.to(device)
            continue
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        mesh = init_device_mesh(device.type, (size(),))
        rounded = {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)}
        matrices = [[part for part in block.modules() if isinstance(part, torch.nn.Linear)]
                    for block in module.trunk.blocks]
        for part in (*(matrices if bf16 else module.trunk.blocks), module):
            several = isinstance(part, list)
            fully_shard(part, mesh=mesh, reshard_after_forward=reshards(part), **rounded if several else {})
            part = part[0] if several else part
            # The losses are parts of a mean over all rows, so gradients are summed and not averaged.
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)


def reshards(part):
    """Whether a part is sharded again after its forward pass. A GPT's heads run after that, so the parameters outside
    its blocks stay gathered until the backward pass is done. In a frozen model they stay so from the first pass on."""
    return not hasattr(part, "policy_head")


@contextmanager
def unsharded(model):
    """Gathers a sharded model for the block. In sampling, processes stop at different steps, so none may wait for
    another."""
    sharded = [module for module in model.modules() if hasattr(module, "unshard")]
    for part in sharded:
        part.unshard()
        part.set_reshard_after_forward(False, recurse=False)
    yield
    for part in sharded:
        part.set_reshard_after_forward(reshards(part), recurse=False)
        part.reshard()


def is_sharded(tensor):
    return hasattr(tensor, "full_tensor")


def local_numel(param):
    """How many numbers of a parameter this process holds."""
    return (param.to_local() if is_sharded(param) else param).numel()


def full_tensors(value):
    """value (a tensor, or a dict or list of them) with each sharded tensor gathered on the CPU. All processes must call
    it."""
    if isinstance(value, dict):
        return {key: full_tensors(item) for key, item in value.items()}
    if isinstance(value, list):
        return [full_tensors(item) for item in value]
    return value.full_tensor().cpu() if is_sharded(value) else value


def shard_like(value, param):
    """A full tensor sharded as param is, if param is sharded and has value's shape; else value unchanged."""
    if not is_sharded(param) or value.shape != param.shape:
        return value
    from torch.distributed.tensor import distribute_tensor
    # Each process has read the same file, so none has to send anything.
    return distribute_tensor(value.to(param.device), param.device_mesh, param.placements, src_data_rank=None)
