"""
Stage 0: supervised fine-tuning. Trains a GPT on demonstrations; the result is the policy that PPO starts from and
the reference that its KL is measured against.

    python train_sft.py                                          the built-in task, on a CPU, in under a minute
    python train_sft.py --data=pairs.jsonl --init_from=gpt2      GPT-2's weights; the chosen answers are demonstrations
    python train_sft.py --data=pairs.jsonl --init_from=Qwen/Qwen3-0.6B     Qwen's, or a folder of Llama or SmolLM2
    python train_sft.py --resume --max_iters=2000                continue from out_dir/sft.pt

The loss is the mean of -log pi over the response tokens of the data, EOS included; prompts are context and are not
trained on. There is no pretraining and no packing here.
"""

import copy
from dataclasses import dataclass
from functools import partial
from typing import Optional

import torch

import atlas
from data import BatchOrder, Demonstration, collate_demonstrations, load_demonstrations
from model import GPT, GPTConfig
from pretrained import LLAMA, is_pretrained
from ppo import masked_mean
from rollout import score_response
from support import distributed
from support.checkpoint import open_run
from support.device import activations, describe, maybe_compile, rows_and_chunk, setup, spare_memory
from support.flags import Flags, require, resolve_sizes, run_script
from support.metrics import Metrics, print_report, progress
from support.optimizer import Optimizer, update_average
from support.stages import load_policy, load_start, read_start, resolve_lr
from tokenizer import DataError, encode_prompt, encode_response, run_tokenizer

EVAL_ROWS = 256  # one evaluation reads at most this many held-out rows


@dataclass
class Config(Flags):
    # this stage
    init_from: Optional[str] = None  # pretrained weights: a folder, a file or a public name; default: random weights
    max_iters: int = 700             # [1, inf) optimizer steps; facts are learned late, long after sentences look right
    batch_size: int = 96             # [1, inf) demonstrations per step
    lr: Optional[float] = None       # [0, inf) default: 1.5e-3, for width 128; 1e-5 from pretrained weights
    dropout: float = 0.0             # [0, 1) helps when epochs are many; the reward model and PPO always run without
    log_interval: int = 100          # [1, inf) iterations between lines, each with the loss on held-out rows
    save_interval: int = 500         # [1, inf) iterations between checkpoints; the last iteration always saves


def starting_model(config, vocab_size):
    """The pretrained model that --init_from names, else one of the given sizes with random weights."""
    if config.init_from:
        start = load_start(config)
        start["model_config"]["dropout"] = config.dropout
        return load_policy(start)
    sizes = resolve_sizes(config)
    require(sizes["n_embd"] % sizes["n_head"] == 0, f"--n_embd={sizes['n_embd']} must be a multiple of "
                                                    f"--n_head={sizes['n_head']}")
    if config.arch == "llama":  # a gated MLP has three matrices, so this is as large as GPT-2's with two
        sizes |= LLAMA.kind | {"mlp_dim": 8 * sizes["n_embd"] // 3}
    return GPT(GPTConfig(vocab_size=vocab_size, dropout=config.dropout, **sizes))


def load_data(config, encoding, block_size):
    """The Split of demonstrations. Raises DataError."""
    return load_demonstrations(config.data, encoding, block_size, config.skip_bad, config.seed, chat=config.chat)


@torch.no_grad()
def knows_country(model, encoding, device):
    """Share of held-out atlas questions where the model finds the right country likelier than a wrong one in the
    same sentence. It tells whether a fact was learned, whatever other answers the demonstrations contain."""
    right, wrong = [], []
    for prompt, *responses in atlas.country_pairs("heldout"):
        for rows, response in zip((right, wrong), responses):
            rows.append(Demonstration(encode_prompt(encoding, prompt), encode_response(encoding, response)))
    totals = []
    for rows in (right, wrong):
        tokens, prompt_lens, _, mask = (x.to(device) for x in collate_demonstrations(rows, encoding.eot_token))
        logprobs, _, _ = score_response(model, tokens, prompt_lens, mask.size(1))
        totals.append((logprobs * mask).sum(1))
    return (totals[0] > totals[1]).float().mean().item()


def train(config):
    """Runs the stage, writes out_dir/sft.pt and returns its final metrics."""
    config.check()
    require(config.init_from is None or is_pretrained(config.init_from), f"--init_from={config.init_from} is neither a "
            "folder nor a file of pretrained weights, nor a public name: give one, or leave it out")
    with open_run(config.replace(), "sft") as run:
        return loop(run.config, run)


def loop(config, run):
    """The stage itself; `run` restores and saves its checkpoint."""
    device, autocast = setup(config)
    start = run.saved or (read_start(config) if config.init_from else None)
    encoding, tokenizer = run_tokenizer(config.tokenizer, config.data, start and start["tokenizer"], config.chat)
    config.chat = tokenizer["chat"]
    resolve_lr(config, start, 1.5e-3, 1e-5)

    if run.saved:
        resolve_sizes(config, run.saved["model_config"])
        model = GPT(GPTConfig(**run.saved["model_config"]))
    else:
        model = starting_model(config, encoding.n_vocab)
    with progress(f"reading {config.data}"):
        split = load_data(config, encoding, model.config.block_size)
    average = copy.deepcopy(model).requires_grad_(False).eval()  # what is evaluated, and saved as the SFT model
    distributed.to_device(device, config, autocast, model, average)
    optimizer = Optimizer(model.parameters(), config)
    done, _ = run.begin(optimizer, {"model": average, "weights": model}, tokenizer)

    print(f"train_sft: {model.n_params:,} parameters on {describe(device, autocast, config.recompute)}, "
          f"tokenizer {encoding.name} ({encoding.n_vocab:,} ids)")
    longest = max(len(row.response) for row in split.train)
    T = max(len(row.prompt) + len(row.response) for row in split.train)
    micro, chunk = rows_and_chunk(config.batch_size, config.micro_batch_size, (longest, model.config.vocab_size),
                                  activations(model.config, T, config.recompute), spare_memory(device, model))
    score = maybe_compile(partial(score_response, entropy=False, chunk=chunk), config.compile)
    print_report(config, split.report, f"; evaluation reads {min(len(split.heldout), EVAL_ROWS)} held-out rows; "
                                       f"{micro} rows per forward pass")

    def loss_of(model, rows):
        """Mean -log pi over the response tokens of rows, and their number."""
        tokens, prompt_lens, _, mask = (x.to(device) for x in collate_demonstrations(rows, encoding.eot_token))
        with autocast():
            logprobs, _, _ = score(model, tokens, prompt_lens, mask.size(1))
        return -masked_mean(logprobs, mask), mask.sum()

    @torch.no_grad()
    def heldout_loss():
        rows, loss_sum, count = split.heldout[:EVAL_ROWS], 0.0, 0
        with distributed.unsharded(average):
            for i in range(0, len(rows), micro):
                loss, n = loss_of(average, rows[i:i + micro])
                loss_sum, count = loss_sum + loss.item() * n.item(), count + n.item()
        return loss_sum / count if count else None

    order = BatchOrder([len(row.prompt) + len(row.response) for row in split.train], config.batch_size, config.seed,
                       window=50)
    # Batches are sorted by length. A mean over each batch's tokens would give those of short responses more weight. So
    # the sums of all batches are divided by one number: the tokens of a batch of average length.
    tokens_per_step = config.batch_size * sum(len(row.response) for row in split.train) / len(split.train)
    metrics, row = Metrics(config, "sft", done), {}
    model.train()
    for iteration in range(done + 1, config.max_iters + 1):
        batch = [split.train[i] for i in order.order(iteration - 1)]
        n_tokens, loss, rows = sum(len(row.response) for row in batch), 0.0, distributed.shard(batch)
        for i in range(0, len(rows), micro):
            part, n = loss_of(model, rows[i:i + micro])
            (part * n / tokens_per_step).backward()
            loss += (part.detach() * n / n_tokens).double()
        loss, = distributed.all_reduce_sum(loss)
        lr, grad_norm = optimizer.step(iteration, loss)
        update_average(average, model, iteration)

        last = iteration == config.max_iters
        look = last or iteration % config.log_interval == 0
        row = metrics.write(iteration, {"loss": loss, "heldout_loss": heldout_loss() if look else None, "lr": lr,
                                        "grad_norm": grad_norm, "skipped_steps": optimizer.skipped})
        run.end(iteration)
    if config.data == "atlas":
        row["knows_country"] = knows_country(average, encoding, device)
        print(f"the right country is likelier than a wrong one on {row['knows_country']:.1%} of the held-out questions")
    print(f"train_sft: wrote {run.path}")
    return row


if __name__ == "__main__":
    run_script(train, Config, __doc__, DataError)
