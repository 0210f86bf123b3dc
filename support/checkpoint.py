"""
Checkpoints, exact resume, locking, signals. docs/reliability.md lists the behaviour for each fault, and its tests.

A checkpoint is one dict of plain values and tensors, never a pickled object. It holds everything that the next
iteration depends on. The order of the data and the scripts' generators are functions of the seed and the iteration, so
`iter` and `flags` are enough for those. The states of torch's global generators are stored.
"""

import hashlib
import math
import os
import shutil
import signal
import threading
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import torch

from support import distributed
from support.flags import UserError, require

try:
    import fcntl
except ImportError:  # Windows, where two runs in one out_dir are not noticed
    fcntl = None


class Damaged(UserError):
    """A checkpoint that is missing or cannot be trusted."""


# ---------------------------------------------------------------------------------------------------------------------
# one file

@contextmanager
def atomic_write(path, previous=None):
    """Yields a binary file to write into. Once it is complete and on the disk, it replaces `path`, whose old contents
    are kept as `previous` if that is given. A crash leaves the complete old file or the complete new one. Raises an
    OSError that names the file if it could not be written."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if previous and Path(path).exists():
            Path(previous).unlink(missing_ok=True)
            try:
                os.link(path, previous)  # a second name for the old file, so that `path` always exists
            except OSError:  # some file systems have no links
                shutil.copyfile(path, previous)
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"could not write {path} ({error.strerror or error}); the file that was there is "
                      "untouched") from error
    finally:
        temporary.unlink(missing_ok=True)  # it still exists only after a failure, such as Ctrl-C


def digest(value, h=None):
    """sha256 over sorted keys, plain values and raw tensor bytes. torch alone would load a flipped byte silently."""
    outermost, h = h is None, h or hashlib.sha256()
    if isinstance(value, dict):
        for key in sorted(value, key=str):
            h.update(f"{key!r}:".encode())
            digest(value[key], h)
    elif isinstance(value, (list, tuple)):
        for item in value:
            digest(item, h)
    elif isinstance(value, torch.Tensor):
        h.update(f"{value.dtype}{tuple(value.shape)}".encode())
        h.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    else:
        h.update(f"{value!r},".encode())  # without the comma, [1, 23] would equal [12, 3]
    return h.hexdigest() if outermost else None


def non_finite(value, name=""):
    """The name of the first number or tensor in `value` that holds NaN or infinity, or None."""
    if isinstance(value, dict):
        return next(filter(None, (non_finite(item, f"{name}.{key}" if name else str(key))
                                  for key, item in value.items())), None)
    finite = value.isfinite().all() if isinstance(value, torch.Tensor) else \
        not isinstance(value, float) or math.isfinite(value)
    return None if finite else name


def save_checkpoint(path, checkpoint, previous=None):
    """Writes the checkpoint and its sha256 with atomic_write. Raises OSError naming the file, e.g. on a full disk."""
    with atomic_write(path, previous) as file:
        torch.save(checkpoint | {"sha256": digest(checkpoint)}, file)


def script(stage):
    return "experiments/trpo.py" if stage == "trpo" else f"train_{stage}.py"


def load_checkpoint(path, *stages):
    """The dict that save_checkpoint wrote. Raises UserError if it is missing, damaged or from a stage not in `stages`.
    The message names the previous checkpoint if there is one."""
    try:
        return read_checkpoint(path, *stages)
    except Damaged as error:
        previous = previous_of(path)
        if not previous.is_file():
            raise
        raise Damaged(f"{error}. The previous one is still there, as {previous}: {' or '.join(map(script, stages))} "
                      "--resume goes back to it") from None


def previous_of(path):
    return Path(path).with_suffix(".prev.pt")


def read_checkpoint(path, *stages):
    """load_checkpoint for one file, without a hint about the previous one."""
    scripts = " or ".join(map(script, stages))
    if not Path(path).is_file():
        raise Damaged(f"{path} is not there: train it first with {scripts}, or name another file")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        recorded = checkpoint["sha256"]
    except Exception as error:  # a damaged file raises anything from EOFError to UnpicklingError
        raise Damaged(f"{path} cannot be read as a checkpoint ({type(error).__name__}): it is corrupt, or "
                      "not a checkpoint of this project") from None
    contents = {name: value for name, value in checkpoint.items() if name != "sha256"}
    if recorded != digest(contents):
        raise Damaged(f"{path} is corrupt: its contents do not match its sha256")
    require(checkpoint["stage"] in stages, f"{path} was written by {script(checkpoint['stage'])}, not by {scripts}")
    tokenizer = checkpoint.get("tokenizer")
    if tokenizer and isinstance(tokenizer["eos"], int):  # from before there were several EOS ids and chat renderings
        tokenizer |= {"eos": [tokenizer["eos"]], "chat": "plain"}
    return checkpoint


def load_finished(path, stage):
    """load_checkpoint for a model that another stage will use. Raises UserError if its training was interrupted: its
    average of the weights is not finished, and a reward model is not calibrated."""
    checkpoint = load_checkpoint(path, stage)
    if not checkpoint["finished"]:
        raise UserError(f"{path} is unfinished, it stopped after iteration {checkpoint['iter']}: finish it with "
                        f"{script(stage)} --resume, or name another file")
    return checkpoint


def load_latest(path, stage):
    """(checkpoint, whether it is the one at path). If that one is damaged, takes the previous one and prints a note."""
    previous = previous_of(path)
    if not path.exists() and not previous.exists():
        raise Damaged(f"{path} is not there, so there is nothing to resume: leave --resume out. Unfinished earlier "
                      "stages continue without it")
    try:
        return read_checkpoint(path, stage), True
    except Damaged as error:
        if not previous.is_file():
            raise
        print(f"note: {error}. Going back to {previous}")
        return read_checkpoint(previous, stage), False


# ---------------------------------------------------------------------------------------------------------------------
# the same run

# Flags that may differ when a run is resumed: no number depends on them, or the file they name is compared by content.
MAY_CHANGE = {"max_iters", "log_interval", "sample_interval", "save_interval", "resume", "overwrite", "out_dir",
              "device", "tokenizer", "n_layer", "n_head", "n_embd", "block_size", "max_bad_steps", "rm", "data",
              "reward", "eval", "tensorboard", "wandb"}
# Flags that only change the order of the arithmetic, and with it the last bits.
MAY_CHANGE_LAST_BITS = {"micro_batch_size", "recompute", "compile", "fsdp"}


def machine(device):
    """Everything else that the last bits of a number depend on."""
    return {"torch": str(torch.__version__), "threads": torch.get_num_threads(), "device": torch.device(device).type,
            "processes": distributed.size()}


def file_sha256(name):
    """sha256 of a file; a built-in name (--data=atlas, --reward=rm) is returned as given."""
    return hashlib.sha256(Path(name).read_bytes()).hexdigest() if Path(name).is_file() else name


def require_same_run(saved, now):
    """Compares two checkpoints: `now` is of the run that will continue `saved`. Raises a UserError that names what
    differs if this would not be the same run, before any tensor is copied. Prints what may change the last bits."""
    def differences(field, names):
        return [f"{name} was {saved[field][name]} and is {now[field][name]}" for name in names
                if name in saved[field] and saved[field][name] != now[field][name]]

    def source(run, name):
        """The hash of a file. For --reward ("f of <hash>") only the function's name: you may fix the function."""
        recorded = run["sources"].get(name)
        return recorded.partition(" of ")[0] if recorded and name == "reward" else recorded

    changed = differences("model_config", now["model_config"]) + differences("tokenizer", (
        "n_vocab", "sha256", "eos", "special_tokens", "chat"))
    require(not changed, "--resume found a checkpoint of another model or tokenizer: " + ", ".join(changed))
    by_content = {"init_from"} if "sft" in now["sources"] else set()
    flags = [name for name in now["flags"] if name not in MAY_CHANGE | MAY_CHANGE_LAST_BITS | by_content]
    changed = [f"--{line}" for line in differences("flags", flags)]
    rung = saved["flags"].get("objective", "clip")  # a flag of experiments/rungs.py, whose `clip` is train_ppo.py
    if rung != now["flags"].get("objective", "clip"):
        changed = [f"--objective was {rung}, which python -m experiments.ladder --objective={rung} continues"]
    require(not changed, "--resume continues the same run, but " + ", ".join(changed) + ": give the old values, or "
            "start again with --overwrite")
    changed = [name for name in now["sources"] if source(saved, name) != source(now, name)]
    changed += ["--data"] if saved["data"] != now["data"] else []
    require(not changed, f"this run began with another {' and '.join(changed)}: put it back, or start again "
            "with --overwrite")
    limit = now["flags"]["max_iters"]
    require(saved["iter"] < limit, f"the checkpoint is at iteration {saved['iter']} already: raise --max_iters="
                                   f"{limit} to continue")
    if saved["sources"].get("reward") != now["sources"].get("reward"):
        print("note: the file of --reward has changed since the checkpoint: the run continues with the new version")
    changed = [f"--{line}" for line in differences("flags", sorted(MAY_CHANGE_LAST_BITS))]
    changed += differences("machine", now["machine"])
    if changed:
        resampled = saved["machine"].get("processes", 1) != distributed.size() and now["stage"] != "sft"
        print(f"note: {', '.join(changed)}: the same run, but not "
              + ("with the same samples, which each process draws for itself" if resampled else "to the last bit"))


# ---------------------------------------------------------------------------------------------------------------------
# one process at a time, and signals

HELD = set()  # folders that this process has locked: train_ppo.py runs the earlier stages inside its own run


@contextmanager
def locked(folder):
    """Keeps other processes out of an out_dir with a lock of the operating system, which ends with this process.
    Raises UserError if another run holds it, or if the lock file cannot be written."""
    folder = folder.resolve()
    if folder in HELD or not distributed.is_first():
        yield
        return
    try:
        file = open(folder / ".lock", "w")
    except OSError as error:
        there = (folder / ".lock").exists()
        raise UserError(f"{folder / '.lock'} cannot be written ({error.strerror}): "
                        + ("remove it if no other run is at work there, or " if there else "")
                        + "give another --out_dir") from None
    with file:
        try:
            if fcntl is None:
                print(f"note: this system has no locks: do not start a second run in {folder}")
            else:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run is at work in {folder}: wait for it, or give another --out_dir") from None
        except OSError as error:  # some network drives have no locks
            print(f"note: {folder} cannot be locked ({error.strerror}): do not start a second run there")
        HELD.add(folder)
        try:
            yield
        finally:
            HELD.discard(folder)


class Signals:
    """SIGINT and SIGTERM during a run. The first one is remembered until the iteration has been saved. The second has
    its default effect: it ends the process at once."""
    listening, received = False, None

    @classmethod
    def receive(cls, number, frame):
        cls.received = number
        for either in (signal.SIGINT, signal.SIGTERM):
            signal.signal(either, signal.SIG_DFL)
        saved = "will be saved" + (" if all processes finish it" if distributed.size() > 1 else "")
        # Not print: the signal may have interrupted a print, which cannot be entered twice.
        with suppress(OSError):
            os.write(2, f"\n{signal.Signals(number).name}: this iteration is the last and {saved}; a second signal "
                        "ends the run at once\n".encode())

    @classmethod
    @contextmanager
    def deferred(cls):
        """Remembers signals inside the block; at its end, puts back the handlers and exits if a signal came."""
        if cls.listening or threading.current_thread() is not threading.main_thread():
            yield
            return
        # A signal that the shell ignores, as under nohup or with a trailing &, stays ignored.
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)
                  if signal.getsignal(number) is not signal.SIG_IGN}
        cls.listening = True
        for number in before:
            signal.signal(number, cls.receive)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            number, cls.received, cls.listening = cls.received, None, False
        cls.exit_if(number)

    @classmethod
    def of_any(cls):
        """The number of a signal that this or another process has received, or 0. All processes must ask together, so
        that they leave after the same iteration."""
        return int(distributed.all_reduce_max(cls.received or 0)[0])

    @staticmethod
    def exit_if(number):
        if number:
            raise SystemExit(128 + number)


@contextmanager
def memory_advice(config, stage):
    """Turns running out of memory, on a GPU or a CPU, into a sentence that says which flags help, in order."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "can't allocate memory" not in str(error):
            raise
        new_run = ", ".join(f"--{name}={getattr(config, name)}" for name in ("max_new_tokens", "batch_size",
                            "block_size", "n_layer", "n_embd") if getattr(config, name, None) is not None)
        said = (str(error) or "MemoryError").splitlines()[0][:120]
        resumed = ", ".join(flag for flag, helps in (
            ("--micro_batch_size below what is printed above", config.micro_batch_size != 1),
            ("--recompute", not config.recompute),
            ("--fsdp", distributed.size() > 1 and not config.fsdp and not config.compile)) if helps)
        resumed = f"For a resumed run, change the first that is enough: {resumed}. " if resumed else ""
        raise UserError(f"{script(stage)}: out of memory ({said}). {resumed}In a new run, lower {new_run}, or take a "
                        "smaller model. The last checkpoint is untouched") from error


# ---------------------------------------------------------------------------------------------------------------------
# a stage at work

def claim_out_dir(config, path):
    """Makes out_dir. Raises UserError if a run cannot write there, or if this stage's checkpoint is there and no flag
    says what to do with it."""
    folder = path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out_dir={folder} cannot be made ({error.strerror}): give another --out_dir") from None
    require(os.access(folder, os.W_OK | os.X_OK), f"--out_dir={folder} is not writable: change that, or give another "
            "--out_dir")
    for log in (folder / "metrics.jsonl", folder / "samples.jsonl"):
        require(not log.exists() or log.is_file() and os.access(log, os.R_OK), f"{log} cannot be read, and a run keeps "
                "the lines of earlier stages and iterations in it: change that, or give another --out_dir")
    require(config.resume or config.overwrite or not path.exists(),
            f"{path} is there already: --resume continues it, --overwrite replaces it, --out_dir writes elsewhere")


@contextmanager
def open_run(config, stage):
    """Yields a stage's Run. Locks its out_dir and defers signals until a save. Scripts wrap their loop in it."""
    path, was_there = config.folder / f"{stage}.pt", os.path.exists(config.folder)
    claim_out_dir(config, path)
    try:
        with locked(config.folder), Signals.deferred(), memory_advice(config, stage):
            if distributed.is_first():
                Path(f"{path}.tmp").unlink(missing_ok=True)  # left by a process that was killed
            print(f"{script(stage)}: writing to {path}", flush=True)
            run = Run(config, stage, path)
            try:
                yield run
            except BaseException:  # a reward function may raise SystemExit, too
                run.rescue()
                raise
    except ValueError:  # the input was wrong: remove the folder if this call made it
        if distributed.is_first() and not was_there and {item.name for item in config.folder.iterdir()} <= {".lock"}:
            (config.folder / ".lock").unlink(missing_ok=True)
            config.folder.rmdir()
        raise


class Run:
    """A script's view of its checkpoint: `saved` (a dict with --resume, else None), `begin`, and `end` to call after
    each iteration."""

    def __init__(self, config, stage, path):
        self.config, self.stage, self.path, self.previous = config, stage, path, previous_of(path)
        # whether path holds an intact checkpoint of this run, which the next save must keep as the previous one
        self.saved, self.keep_previous = load_latest(path, stage) if config.resume else (None, False)
        self.unsaved = None  # the arguments of `write` for the last iteration, and the optimizer's calls until then

    def begin(self, optimizer, modules, tokenizer, sources=()):
        """Takes what checkpoints will contain: the optimizer, modules {name: module} with "model" among them, the
        tokenizer_id, and the sources {name: sha256} that the run depends on. With --resume, restores the state of
        these and of torch's generators. Returns (iteration, the checkpoint's other fields), or (0, {}) for a fresh
        start. Raises UserError if the checkpoint is from another run."""
        self.optimizer, self.modules, sources = optimizer, modules, dict(sources)
        file, _, function_name = getattr(self.config, "reward", "rm").rpartition(":")
        if file:
            sources["reward"] = f"{function_name} of {file_sha256(file)}"
        self.fields = {"stage": self.stage, "model_config": asdict(modules["model"].config), "tokenizer": tokenizer,
                       "sources": sources, "data": file_sha256(self.config.data), "flags": asdict(self.config),
                       "machine": machine(optimizer.params[0].device)}
        if not self.saved:
            return 0, {}
        saved, self.saved = self.saved, None
        require_same_run(saved, self.fields)
        for name, module in modules.items():
            now = module.state_dict()
            module.load_state_dict({key: distributed.shard_like(value, now.get(key)) for key, value in
                                    saved[name].items()}, strict=True)
        optimizer.load(saved["optimizer"])
        set_rng_state(saved["rng"])
        print(f"continuing after iteration {saved['iter']}")
        return saved["iter"], {name: value for name, value in saved.items() if name not in (*modules, "optimizer")}

    def end(self, iteration, **more):
        """Ends an iteration. Saves it, with the fields `more`, if it is the last or a multiple of save_interval, or if
        a signal came."""
        regular = iteration == self.config.max_iters or iteration % self.config.save_interval == 0
        if Signals.of_any() or regular:
            self.save(iteration, **more)
        else:
            self.unsaved = (iteration, more, rng_state()), self.optimizer.calls

    def save(self, iteration, **more):
        """Writes the checkpoint, then exits with code 130 or 143 if a signal came."""
        self.write(iteration, more, rng_state())
        self.unsaved = None
        signal_number = Signals.of_any()  # here the other processes wait for the file
        if signal_number:
            print(f"{script(self.stage)}: saved iteration {iteration}; {script(self.stage)} --resume continues it"
                  + (", and train_ppo.py continues with it, too" if self.stage in ("sft", "rm") else ""), flush=True)
        Signals.exit_if(signal_number)

    def rescue(self):
        """Saves the last iteration before an exception ends the run, if no optimizer step has been taken since. With
        several processes this is impossible, because those that raised nothing are elsewhere in the code."""
        if self.unsaved and self.unsaved[1] == self.optimizer.calls and distributed.size() == 1:
            with suppress(Exception):  # the exception that ends the run is the one to show
                self.write(*self.unsaved[0])
                print(f"{script(self.stage)}: saved iteration {self.unsaved[0][0]}, the last one before the error; "
                      "--resume continues it", flush=True)

    def write(self, iteration, more, rng):
        """Writes the checkpoint and keeps the previous one as *.prev.pt. Raises FloatingPointError, and writes
        nothing, if a number in it is not finite."""
        contents = {name: module.state_dict() for name, module in self.modules.items()} | self.fields | more | {
            "iter": iteration, "finished": iteration == self.config.max_iters, "optimizer": self.optimizer.state(),
            "rng": rng}
        contents = distributed.full_tensors(contents)
        bad = non_finite(contents)
        if bad:
            raise FloatingPointError(f"iteration {iteration}: {bad} is not finite, so nothing was saved, and the last "
                                     "checkpoint is untouched: begin a new run with a lower --lr")
        if distributed.is_first():
            if not self.keep_previous and not self.config.resume:
                self.previous.unlink(missing_ok=True)  # it belongs to the run that --overwrite replaces
            save_checkpoint(self.path, contents, self.previous if self.keep_previous else None)
        self.keep_previous = True


def rng_state():
    """State of torch's global generators, which dropout draws from. With several GPUs it is that of this
    process's GPU: the first process writes the file, and all of them draw the same numbers."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None}


def set_rng_state(state):
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and isinstance(state["cuda"], torch.Tensor):  # else it was saved without a GPU
        torch.cuda.set_rng_state(state["cuda"])
