"""
Times the same PPO iteration here and in TRL, and the same sampling here and in transformers, by turns on one machine.

    pip install trl==1.12.0 transformers==5.23.0 accelerate datasets    optional; 1.12.0 is the last TRL with PPO
    python -m experiments.against_trl --preset=tiny                     also small, gpt2

Every contender runs in its own process, does a warm-up iteration and then waits. In each round every contender runs one
iteration while all others sleep. Ratios are formed within a round: what slows the machine for a while slows both sides.

Both sides have the same initial weights (written by save_pretrained), batch size, prompt lengths, response lengths
(no EOS cuts one short), AdamW and threads. Each has a reference and a reward model of the policy's size. Epochs x
minibatches are equal and so are the optimizer steps, which are counted. TRL gets the settings that this needs and that
are fastest here: the whole batch as one device batch without gradient accumulation, because with it TRL takes one step
per epoch; one generate call for all rows; no samples, no logging service.

One difference: TRL trains a separate value network beside the policy. So the ratio is also given with
--critic=separate here, which does the same. TRL computes logits at all positions and the entropy by a second softmax.
That is TRL's own code, so it counts. TRL's bf16 flag does nothing on a CPU in this version. So "bfloat16" runs every
forward pass of its models under a real autocast, as ours do, sampling included, which makes them faster.
"""

import contextlib
import functools
import multiprocessing
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

import data
import train_ppo
from pretrained import save_pretrained
from rollout import generate
from support import metrics
from support.checkpoint import load_checkpoint
from support.device import generator, pick_device, setup
from support.flags import UserError, check_domains, require, require_one_process, run_script
from support.stages import load_policy
from tokenizer import DataError, get_tokenizer
from tools import bench

# What is compared: (theirs, ours, the ratio's label in the table). Of several contenders on a side, the fastest counts.
OURS, SEPARATE = ("ours-float32", "ours-bfloat16"), ("ours-float32-separate", "ours-bfloat16-separate")
TRL = ("trl-float32", "trl-medium", "trl-bfloat16")
COMPARISONS = (
    (TRL[:1], OURS, "ours at its best against TRL's default"),
    (TRL, OURS, "best against best"),
    (TRL[:1], OURS[:1], "float32 against float32"),
    (TRL[1:2], OURS[:1], "float32 against float32, TRL with matmul precision medium"),
    (TRL[2:], OURS[1:], "bfloat16 against bfloat16"),
    (TRL[:1], SEPARATE, "separate critic: ours at its best against TRL's default"),
    (TRL, SEPARATE, "separate critic: best against best"),
    (TRL[:1], SEPARATE[:1], "separate critic: float32 against float32"),
    (("transformers-float32",), ("generate-float32",), "sampling alone, float32"),
    (("transformers-bfloat16",), ("generate-bfloat16",), "sampling alone, bfloat16"),
)
TRAINING = "trl-float32,ours-float32,trl-bfloat16,ours-bfloat16,ours-float32-separate,ours-bfloat16-separate"
SAMPLING = "transformers-float32,generate-float32,transformers-bfloat16,generate-bfloat16"


@dataclass
class Config:
    preset: str = "tiny"                         # tiny|small|gpt2: as in tools/bench.py
    rounds: int = 3                              # [1, inf) iterations of each contender
    contenders: str = f"{TRAINING},{SAMPLING}"   # who takes part, in this order; trl-medium is possible, too
    device: str = "auto"                         # auto|cpu|cuda: auto takes cuda if there is one


def require_peers():
    os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1",
                   "PYTHONWARNINGS": "ignore"}  # the contenders inherit these; errors still show
    try:
        import datasets  # noqa: F401
        import transformers  # noqa: F401
        from trl.experimental.ppo import PPOTrainer  # noqa: F401
    except ImportError as error:
        raise UserError(f"the comparison needs TRL's PPOTrainer ({error}): pip install trl==1.12.0 "
                        "transformers==5.23.0 accelerate datasets") from None


# ---------------------------------------------------------------------------------------------------------------------
# contenders: each is a process that receives the dtype of an iteration and sends its row back

class Turn:
    """A contender's end of the pipe."""

    def __init__(self, connection):
        self.connection, self.dtype = connection, None

    def wait(self):
        """Sleeps until it is this process's turn. Raises bench.Enough when there are no more turns."""
        try:
            self.dtype = self.connection.recv()
        except EOFError:
            raise bench.Enough from None
        self.clock = time.perf_counter()

    def done(self, device, **row):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        row = {"seconds": time.perf_counter() - self.clock, "matmul": torch.get_float32_matmul_precision()} | row
        self.connection.send(row)


def run_ours(turn, folder, size, device, contender):
    _, dtype, *separate = contender.split("-")

    def after(row):
        turn.done(device, seconds=row["seconds"], optimizer_steps=row["optimizer_steps"],
                  tokens=round(row["response_len"] * size.batch_size))
        turn.wait()

    turn.wait()
    bench.run_iterations(bench.train_config(folder, size, out_dir=str(folder / contender), device=device.type,
                                            dtype=dtype, critic="separate" if separate else "shared"), after)


def under_autocast(module, turn, device):
    """Makes every forward of `module` run under a bfloat16 autocast in the turns of that dtype. Logits come out in
    float32, as in accelerate's mixed precision. Each forward has its own autocast, because autocast keeps its casts of
    the weights until it ends, and the optimizer changes the weights."""
    forward = module.forward

    @functools.wraps(forward)
    def autocast_forward(*args, **kwargs):
        if turn.dtype != "bfloat16":
            return forward(*args, **kwargs)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            out = forward(*args, **kwargs)
        if isinstance(out, torch.Tensor):
            return out.float()
        if "logits" in out:
            out.logits = out.logits.float()
        return out

    module.forward = autocast_forward


def run_trl(turn, folder, size, device, contender):
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import (GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedTokenizerFast, TrainerCallback)
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    steps, tokens = [], []  # of one iteration

    class TakesTurns(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            turn.wait()
            torch.set_float32_matmul_precision("medium" if turn.dtype == "medium" else "highest")

        def on_step_end(self, *args, **kwargs):
            turn.done(device, optimizer_steps=len(steps), tokens=sum(tokens))
            steps.clear()
            tokens.clear()
            self.on_train_begin()

    policy, reference = (GPT2LMHeadModel.from_pretrained(folder / "gpt2") for _ in range(2))
    value, reward = (GPT2ForSequenceClassification.from_pretrained(folder / "gpt2", num_labels=1) for _ in range(2))
    eos = size.vocab_size - 1
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<eos>": eos}, unk_token="<eos>")),
                                        eos_token="<eos>", pad_token="<eos>")
    for model in (value, reward):
        model.config.pad_token_id = eos
    for module in (policy, reference, value.transformer, value.score, reward.transformer, reward.score):
        under_autocast(module, turn, device)
    sample = policy.generate

    def counted_generate(*args, **kwargs):
        out = sample(*args, **kwargs)
        tokens.append(out.sequences[:, size.prompt_len:].numel())
        return out

    policy.generate = counted_generate
    prompts = prompts_of(folder, size)
    trainer = PPOTrainer(
        args=PPOConfig(output_dir=str(folder / "trl"), per_device_train_batch_size=size.batch_size,
                       gradient_accumulation_steps=1, num_ppo_epochs=size.epochs, num_mini_batches=size.minibatches,
                       local_rollout_forward_batch_size=size.batch_size, response_length=size.response_len,
                       total_episodes=10**6 * size.batch_size, temperature=1.0, learning_rate=1e-6, bf16=False,
                       gradient_checkpointing=False, use_cpu=device.type == "cpu", report_to="none", save_strategy="no",
                       num_sample_generations=0, disable_tqdm=True),
        processing_class=tokenizer, model=policy, ref_model=reference, reward_model=reward, value_model=value,
        train_dataset=Dataset.from_dict({"input_ids": prompts}), eval_dataset=Dataset.from_dict({"input_ids": prompts}),
        callbacks=[TakesTurns()])
    trainer.optimizer.optimizer.register_step_post_hook(lambda *_: steps.append(1))
    trainer.train()


def prompts_of(folder, size):
    encoding = get_tokenizer(folder / "tokens.tiktoken")
    return data.load_prompts(str(folder / "prompts.jsonl"), encoding, size.model.block_size, size.response_len).train


def run_transformers(turn, folder, size, device, contender):
    from transformers import GPT2LMHeadModel
    model = GPT2LMHeadModel.from_pretrained(folder / "gpt2").to(device).eval()
    if contender.endswith("bfloat16"):
        model = model.bfloat16()  # its fastest: under autocast each step would cast all weights again
    prompts = torch.tensor(prompts_of(folder, size)[:size.batch_size], device=device)
    while True:
        turn.wait()
        out = model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=size.response_len,
                             do_sample=True, top_k=0, eos_token_id=None, pad_token_id=size.vocab_size - 1)
        turn.done(device, tokens=out[:, size.prompt_len:].numel())


def run_generate(turn, folder, size, device, contender):
    _, autocast = setup(train_ppo.Config(device=device.type, dtype=contender.split("-")[1]))
    policy = load_policy(load_checkpoint(folder / "sft.pt", "sft"), device)
    prompts = torch.tensor(prompts_of(folder, size)[:size.batch_size], device=device)
    lens, n = torch.full((size.batch_size,), size.prompt_len, device=device), 0
    while True:
        turn.wait()
        n += 1
        with autocast():
            rollout = generate(policy, prompts, lens, size.response_len, eos=size.vocab_size - 1,
                               generator=generator(device, n))
        turn.done(device, tokens=int(rollout.mask.sum()))


RUN = {"ours": run_ours, "trl": run_trl, "transformers": run_transformers, "generate": run_generate}


def contend(connection, contender, folder, size, device, threads):
    """What a contender's process does, from its first turn to its last."""
    torch.set_num_threads(threads)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.suppress(bench.Enough):
        RUN[contender.split("-")[0]](Turn(connection), folder, size, device, contender)


# ---------------------------------------------------------------------------------------------------------------------
# rounds

def hold(contenders, folder, size, device, rounds):
    """{contender: its rows, one per round}. TRL's dtypes share a process, as they share its weights."""
    spawn, pipes, processes, rows = multiprocessing.get_context("spawn"), {}, [], {name: [] for name in contenders}
    try:
        for name in contenders:
            key = "trl" if name.startswith("trl") else name
            if key not in pipes:
                pipes[key], theirs = spawn.Pipe()
                processes.append(spawn.Process(target=contend, daemon=True, args=(
                    theirs, name, folder, size, device, torch.get_num_threads())))
                processes[-1].start()
                theirs.close()
            pipes[name] = pipes[key]
            take(pipes[name], name)  # the warm-up
        for n in range(rounds):
            for name in contenders:
                rows[name].append(take(pipes[name], name))
                print(f"round {n + 1}/{rounds}  {name:<24}{rows[name][-1]['seconds']:8.3f} s", flush=True)
    finally:
        for process in processes:
            process.kill()  # train_ppo.py answers a gentler signal by saving first
            process.join()
    return rows


def take(pipe, contender):
    """One turn of a contender: its row."""
    try:
        pipe.send(contender.split("-")[1])
        return pipe.recv()
    except (EOFError, ConnectionError):
        raise UserError(f"{contender} died: see its error above. If there is none, memory probably ran out: let "
                        "fewer take part at a time with --contenders") from None


def print_tables(rows):
    print("\n| contender | matmul precision | median seconds (lowest to highest) | optimizer steps | response tokens |")
    print("|---|---|---|---|---|")
    for name, turns in rows.items():
        seconds, last = [row["seconds"] for row in turns], turns[-1]
        print(f"| {name} | {last['matmul']} | {median(seconds):.3f} ({min(seconds):.3f} to {max(seconds):.3f}) | "
              f"{last.get('optimizer_steps', '')} | {last['tokens']:,} |")
    print("\n| ratio | theirs / ours | median | round by round |")
    print("|---|---|---|---|")
    for theirs, ours, what in COMPARISONS:
        theirs, ours = ([name for name in side if name in rows] for side in (theirs, ours))
        if theirs and ours:
            theirs, ours = (min(side, key=lambda name: median(row["seconds"] for row in rows[name]))
                            for side in (theirs, ours))
            ratios = [a["seconds"] / b["seconds"] for a, b in zip(rows[theirs], rows[ours])]
            print(f"| {what} | {theirs} / {ours} | {median(ratios):.2f} | {', '.join(f'{r:.2f}' for r in ratios)} |")


def main(config):
    check_domains(config)
    require_one_process("experiments/against_trl.py")
    names = config.contenders.split(",")
    known = {name for theirs, ours, _ in COMPARISONS for name in theirs + ours}
    require(set(names) <= known, f"--contenders={config.contenders}: choose from {', '.join(sorted(known))}")
    require_peers()
    size, device = bench.Config(preset=config.preset, device=config.device).size(), pick_device(config)
    header, rows = metrics.header(config, "against_trl"), {}
    print(f"{config.preset}: {size}\n{bench.machine(device)}, torch {header['torch']}, commit {header['commit']}, "
          f"{time.strftime('%Y-%m-%d')}, {config.rounds} rounds after a warm-up\n")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        bench.write_inputs(folder, size)
        policy = load_policy(load_checkpoint(folder / "sft.pt", "sft"))
        save_pretrained(policy, get_tokenizer(folder / "tokens.tiktoken"), folder / "gpt2")
        for group in (TRAINING + ",trl-medium", SAMPLING):  # one after the other, as memory may not hold all
            rows |= hold([name for name in names if name in group.split(",")], folder, size, device, config.rounds)
    work = {(row["tokens"], row.get("optimizer_steps", size.epochs * size.minibatches))
            for turns in rows.values() for row in turns}
    require(len(work) == 1, f"the contenders did unequal work, (tokens, optimizer steps): {sorted(work)}")
    print_tables(rows)
    return rows


if __name__ == "__main__":
    run_script(main, Config, __doc__, DataError)
