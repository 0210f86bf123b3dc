"""
Stage 2: PPO. Samples answers, scores them, and makes the policy likelier to sample what scored above expectation,
while the KL to the SFT policy holds it near the text that the reward model was trained to judge.

    python train_ppo.py                                  everything on the built-in task; makes sft.pt and rm.pt first
    python train_ppo.py --reward=my_reward.py:f          any function f(prompts, responses) -> list of floats
    python train_ppo.py --init_from=sft.pt --rm=rm.pt --data=pairs.jsonl --lr=1e-5 --compile       on a GPU
    python train_ppo.py --resume --max_iters=200         go on from out_dir/ppo.pt

Shapes: B = batch_size responses of at most R tokens, T = prompt + response. Maximised, per token:
clipped surrogate - vf_coef * value loss + ent_coef * entropy, where the reward inside the surrogate's advantages is
score - kl_coef * KL (--kl_in=reward), or the KL is one more term (--kl_in=loss). Mathematics: ppo.py; sampling:
rollout.py; sharing out rows under torchrun: distributed.py, which gives them back as they are in a single process.
"""

from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import ClassVar, Optional

import torch

import atlas
import common
import data
import distributed
import train_rm
import train_sft
from checkpoint import load_checkpoint, open_run
from metrics import Metrics
from model import GPT, GPTConfig
from ppo import (OBJECTIVES, KLController, PenaltyController, explained_variance, kl_estimate, log_ratio, masked_mean,
                 shape_rewards, surrogate_loss, token_advantages, value_loss, whiten)
from reward_model import RewardModel
from rollout import generate, score_response, score_values


@dataclass
class Config(common.Flags):
    init_from: Optional[str] = None  # the SFT checkpoint, start and reference of the policy; default: out_dir/sft.pt
    rm: Optional[str] = None         # the reward model's checkpoint; default: out_dir/rm.pt
    reward: str = "rm"               # rm, or path/to/file.py:function, f(prompts, responses) -> list of floats
    max_iters: int = 100             # rollouts; enough once score - kl_coef * kl is flat
    batch_size: int = 256            # responses per rollout; more is steadier
    samples_per_prompt: int = 1      # responses to each prompt of a rollout; --advantage=group needs 2 or more
    objective: str = "clip"          # or reinforce, reward_to_go, baseline, gae, cpi, kl_penalty: docs/derivation.md
    advantage: str = "gae"           # gae, or group: the score above that of a prompt's other responses, and no critic
    minibatches: Optional[int] = None  # optimizer steps per epoch; default 4; up to --objective=gae there is one
    epochs: Optional[int] = None     # passes over a rollout; default 1; more reuses it farther from its policy
    max_new_tokens: int = 16         # longest response; one that is cut there gets eos_penalty
    temperature: float = 1.0         # of the sampled distribution, and so of every log-prob
    lr: float = 4e-4                 # at width 128; 1e-5 at 124M parameters, 3e-6 at 1B
    kl_coef: float = 0.05            # price of a nat of KL, in std of the SFT answers' scores; 0 invites reward hacking
    kl_target: Optional[float] = None  # steer kl_coef towards this KL in nats per response; default: kl_coef stays
    kl_in: str = "reward"            # reward: -kl_coef * k1 on each token; loss: a term of the loss
    kl_kind: Optional[str] = None    # with --kl_in=loss: k2 (default) or k3 (the forward KL)
    clip: Optional[float] = None     # the ratio moves this far from 1 before its gradient stops; default 0.2
    penalty_target: Optional[float] = None  # kl_penalty: nats per token from the sampling policy; default 0.01
    value_clip: Optional[float] = None  # values stay this close to the old ones, in units of score
    vf_coef: Optional[float] = None  # weight of the value loss, felt in a shared trunk; default 0.1
    ent_coef: float = 0.0            # weight of the entropy bonus; 0.01 when entropy collapses early
    gamma: float = 1.0               # discount per token; below 1 short answers pay
    lam: Optional[float] = None      # GAE: 1 trusts the rewards, 0 the critic; default 0.95
    target_kl: Optional[float] = None  # end the epochs at this distance from the sampling policy
    eos_penalty: float = 1.0         # taken off the score of a response without EOS, in standard deviations
    critic: Optional[str] = None     # separate (default; starts from the reward model if any), or shared: cheaper
    sample_interval: int = 20        # iterations between samples on the screen and looks at the held-out questions
    log_interval: int = 5            # iterations between lines on the screen; metrics.jsonl gets every one

    DOMAINS: ClassVar[dict] = common.Flags.DOMAINS | {
        "minibatches": "[1, inf)", "epochs": "[1, inf)", "max_new_tokens": "[1, inf)", "temperature": "(0, inf)",
        "kl_coef": "[0, inf)", "kl_target": "(0, inf)", "kl_in": ("reward", "loss"), "clip": "(0, 1)",
        "value_clip": "(0, inf)", "vf_coef": "[0, inf)", "ent_coef": "[0, inf)", "gamma": "[0, 1]", "lam": "[0, 1]",
        "target_kl": "(0, inf)", "eos_penalty": "[0, inf)", "critic": ("shared", "separate"),
        "samples_per_prompt": "[1, inf)", "objective": OBJECTIVES, "advantage": ("gae", "group"),
        "penalty_target": "(0, inf)", "sample_interval": "[1, inf)"}

    # What only some objectives use, with the defaults: a rung of the ladder adds to the one before it.
    CRITIC: ClassVar[dict] = {"critic": "separate", "vf_coef": 0.1, "value_clip": None}
    GAE: ClassVar[dict] = CRITIC | {"lam": 0.95}
    REUSE: ClassVar[dict] = GAE | {"epochs": 1, "minibatches": 4, "target_kl": None}
    USES: ClassVar[dict] = {"reinforce": {}, "reward_to_go": {}, "baseline": CRITIC, "gae": GAE, "cpi": REUSE,
                            "kl_penalty": REUSE | {"penalty_target": 0.01}, "clip": REUSE | {"clip": 0.2}}

    def used(self):
        """{flag: default} of the flags in USES that this run uses."""
        return {name: default for name, default in self.USES[self.objective].items()
                if self.advantage == "gae" or name not in self.GAE}

    def resolved(self):
        """The config with the defaults of its objective filled in."""
        defaults = {"epochs": 1, "minibatches": 1} | self.used()
        return replace(self, **{name: value for name, value in defaults.items() if getattr(self, name) is None})

    def check(self):
        super().check()
        for name in (self.USES["kl_penalty"] | self.USES["clip"]).keys() - self.used().keys():
            value, run = getattr(self, name), f"--objective={self.objective} with --advantage={self.advantage}"
            if name in ("epochs", "minibatches"):
                common.require(value in (None, 1), f"--{name}={value}, but {run} takes one step per rollout: its "
                               "formula holds for the policy that sampled; cpi, kl_penalty and clip may reuse one")
            else:
                common.require(value is None, f"--{name}={value} would do nothing in {run}: leave it out")
        group, k = self.advantage == "group", self.samples_per_prompt
        B, n = self.batch_size, self.resolved().minibatches
        common.require(not group or self.objective in ("baseline", "cpi", "kl_penalty", "clip"), "--advantage=group is "
                       f"a baseline, which has no place in --objective={self.objective}: use baseline or cpi to clip")
        common.require(not group or k > 1, "--advantage=group compares the responses to a prompt with each other: set "
                                           "--samples_per_prompt to 2 or more")
        common.require(B % k == 0, f"--batch_size={B} must be a multiple of --samples_per_prompt={k}")
        common.require(B % n == 0, f"--batch_size={B} must be a multiple of --minibatches={n}, but {B} = {n} x "
                       f"{B // n} + {B % n}")
        common.require(self.kl_in == "loss" or self.kl_kind is None, "--kl_kind is for --kl_in=loss; in the reward the "
                       "KL is always k1, the only one with the right gradient there")
        common.require(self.kl_kind != "k1", "--kl_kind=k1 in the loss does nothing: the expected gradient of log pi - "
                       "log pi_ref over the policy's own samples is zero; use k2 or k3")
        common.require(self.kl_kind in (None, "k2", "k3"), f"--kl_kind={self.kl_kind} must be k2 or k3")
        common.require(self.kl_target is None or self.kl_coef > 0, "--kl_target steers by multiplying kl_coef, so "
                       "--kl_coef=0 would stay 0: give a start above 0")
        common.require(self.reward == "rm" or self.rm is None, "--rm names a reward model, but --reward names a "
                       "function: give one of them")


# ---------------------------------------------------------------------------------------------------------------------
# what the loop starts from

def make_missing_stages(config):
    """Trains sft.pt and rm.pt in out_dir where they are missing or unfinished, with those stages' own defaults."""
    inherited, missing = {name: getattr(config, name) for name in config.INHERITED}, []
    for name, stage, needed in (("sft", train_sft, config.init_from is None),
                                ("rm", train_rm, config.rm is None and config.reward == "rm")):
        path = config.folder / f"{name}.pt"
        saved = load_checkpoint(path, name) if needed and path.exists() else None
        if needed and not (saved and saved["finished"]):
            flags = saved["flags"] | {"resume": True, "overwrite": False} if saved else {}
            flags |= {"init_from": config.init_from} if name == "rm" else {}
            missing.append((path, stage, stage.Config(**flags | inherited)))
            missing[-1][2].check()  # all of them before the first trains
    for path, stage, its_config in missing:
        print(f"{path} is {'unfinished' if its_config.resume else 'not there'}: running {stage.__name__}.py first\n")
        stage.train(its_config)
        print()


def load_policy(checkpoint, device):
    """The GPT of a checkpoint. It stays in eval mode for good: with dropout the same policy would give other log-probs
    on every pass, and the ratio would measure that."""
    policy = GPT(GPTConfig(**checkpoint["model_config"])).to(device).eval()
    policy.load_state_dict(checkpoint["model"], strict=True)
    return policy


def load_reward_model(config, tokenizer, block_size, device):
    """(RewardModel in eval mode without gradients, its checkpoint). Raises UserError if it reads another tokenizer, or
    less than the block_size tokens that the policy may write. Says so if it was calibrated on other answers."""
    checkpoint = load_checkpoint(config.rm or config.folder / "rm.pt", "rm")
    theirs = checkpoint["tokenizer"]
    common.require(theirs["sha256"] == tokenizer["sha256"], f"the reward model's tokenizer is {theirs['name']} "
                   f"({theirs['n_vocab']:,} ids) and the policy's {tokenizer['name']} ({tokenizer['n_vocab']:,} ids): "
                   "train both with the same --tokenizer")
    reads = checkpoint["model_config"]["block_size"]
    common.require(reads >= block_size, f"the reward model reads {reads} tokens and the policy may write {block_size}: "
                   "train both from the same SFT checkpoint")
    for name in ("max_new_tokens", "temperature"):
        if checkpoint["flags"][name] != getattr(config, name):
            print(f"note: the reward model was calibrated at --{name}={checkpoint['flags'][name]}, and this run has "
                  f"{getattr(config, name)}, so scores may not start at mean 0 and std 1: train_rm.py has the flag too")
    reward_model = RewardModel(GPTConfig(**checkpoint["model_config"])).to(device).eval().requires_grad_(False)
    reward_model.load_state_dict(checkpoint["model"], strict=True)
    return reward_model, checkpoint


# ---------------------------------------------------------------------------------------------------------------------
# the loop

def train(config):
    """Runs PPO, and first the stages that are missing; writes out_dir/ppo.pt and returns the final metrics."""
    config.check()
    with open_run(config.resolved(), "ppo") as run:
        return loop(run.config, run)


def loop(config, run):
    """What train does once out_dir is its own; `run` restores and saves its checkpoint."""
    sft_path = config.init_from or config.folder / "sft.pt"
    minibatch_size = config.batch_size // config.minibatches
    function = None if config.reward == "rm" else common.load_reward_function(config.reward)

    # Everything that can be wrong with flags and files is looked at before the first stage trains.
    sft = load_checkpoint(sft_path, "sft") if config.init_from or sft_path.exists() else None
    encoding, tokenizer = data.run_tokenizer(config.tokenizer, config.data, sft and sft["tokenizer"])
    block_size = common.resolve_sizes(config, sft and sft["model_config"])["block_size"]
    split = data.load_prompts(config.data, encoding, block_size, config.max_new_tokens, config.skip_bad)
    eos, V = encoding.eot_token, encoding.n_vocab
    micro = common.micro_batch_size(minibatch_size, config.micro_batch_size, config.max_new_tokens * V, by_length=True)
    if config.rm:
        load_reward_model(config, tokenizer, block_size, "cpu")
    make_missing_stages(config)

    device, autocast = common.setup(config)
    sft = load_checkpoint(sft_path, "sft")
    policy, reference = load_policy(sft, "cpu"), load_policy(sft, "cpu").requires_grad_(False)
    reward_model, rm = (None, {}) if function else load_reward_model(config, tokenizer, block_size, "cpu")
    if rm and rm["sources"]["sft"] != sft["sha256"]:
        print("note: the reward model was calibrated on another SFT policy, so its scores are not in units of this one")
    critic = None
    if config.critic == "separate":
        critic = reward_model.as_critic() if reward_model else load_policy(sft, "cpu")
    distributed.place(device, config, policy, reference, reward_model, critic)
    modules = {"model": policy} | ({"critic": critic} if critic else {})
    optimizer = common.Optimizer([p for module in modules.values() for p in module.parameters()], config)
    start, saved = run.begin(optimizer, modules, tokenizer, {"sft": sft["sha256"], "rm": rm.get("sha256")})
    controller = KLController(saved.get("kl_coef", config.kl_coef), config.kl_target)
    penalty = PenaltyController(config.penalty_target, saved.get("penalty", 1.0)) if config.penalty_target else None
    score_tokens, value_tokens = (common.maybe_compile(f, config.compile) for f in
                                  (partial(score_response, temperature=config.temperature), score_values))
    order = data.BatchOrder([1] * len(split.train), config.batch_size // config.samples_per_prompt, config.seed)

    n_steps, logits_mb = config.epochs * config.minibatches, 4e-6 * micro * config.max_new_tokens * V
    print(f"train_ppo: {policy.n_params:,} parameters on {common.describe(device, autocast, config.recompute)}, "
          f"tokenizer {encoding.name} ({V:,} ids)")
    print(f"{config.data}: {'; '.join(split.report)}")
    print(f"{config.batch_size} responses per rollout, {config.epochs} epochs x {config.minibatches} minibatches of "
          f"{minibatch_size} = {n_steps} optimizer steps per rollout, {micro} responses per forward pass "
          f"({logits_mb:.0f} MB of logits)")
    print(" ".join(f"{name}={value}" for name, value in asdict(config).items() if value is not None))

    def roll_out(model, prompts, rng):
        """Rollout of `model` on prompts (lists of ids), its texts [(prompt, response)] and its scores (B,)."""
        tokens, prompt_lens = (x.to(device) for x in data.collate_prompts(prompts, eos))
        with autocast(), distributed.whole_on_each(model):
            rollout = generate(model, tokens, prompt_lens, config.max_new_tokens, eos=eos,
                               temperature=config.temperature, generator=rng)
        texts = [(data.decode(encoding, row[:p]), data.decode(encoding, row[p:n])) for row, p, n in
                 zip(rollout.tokens.tolist(), rollout.prompt_lens.tolist(), rollout.lens.tolist())]
        if function:
            return rollout, texts, common.call_reward_function(function, *map(list, zip(*texts))).to(device)
        with torch.no_grad(), autocast():
            scores = [reward_model(*rows) for rows in zip(rollout.tokens.split(micro), rollout.lens.split(micro))]
        return rollout, texts, common.require_finite(torch.cat(scores), texts)

    @torch.no_grad()
    def rescore(model, rollout, score=score_tokens):
        """What `score` gives for a whole rollout, in the very passes that the first epoch makes: a matrix product may
        round differently for another number of rows, and then the first ratio would not be exactly 1."""
        lens, R = rollout.lens.cpu(), rollout.mask.size(1)
        passes = [part for rows in torch.arange(len(lens)).split(common.share_size(minibatch_size))
                  for part in data.like_lengths(lens, rows, micro, device)]
        with autocast():
            parts = [score(model, rollout.tokens[i, :T], rollout.prompt_lens[i], R) for i, T in passes]
        place = torch.cat([i for i, _ in passes]).argsort()  # back to the order of the rollout
        return [torch.cat(part)[place] for part in zip(*parts)]

    def show(model, prompts, purpose):
        """[(prompt, response, score, KL)] of sampled answers, from a generator of its own: looking changes nothing."""
        rollout, texts, scores = roll_out(model, prompts, common.generator(device, config.seed, purpose))
        kl = ((rescore(model, rollout)[0] - rescore(reference, rollout)[0]) * rollout.mask).sum(1)
        return [(*text, score, k) for text, score, k in zip(texts, scores.tolist(), kl.tolist())]

    heldout = split.heldout or split.train
    questions = heldout[::max(1, len(heldout) // 10)][:10]
    metrics, row = Metrics(config, "ppo", start), {}
    for iteration in range(start + 1, config.max_iters + 1):
        clock = common.Clock(device)

        # -- prompts -> generate: sampled responses, under the policy as it is now
        prompts = [split.train[i] for i in order.order(iteration - 1) for _ in range(config.samples_per_prompt)]
        rng = common.generator(device, config.seed, distributed.own("rollout"), iteration)
        parts = roll_out(policy, distributed.share(prompts), rng)  # a process samples its own rows, then all have all
        rollout, texts, scores = distributed.gather(parts[0], tokens=eos), *map(distributed.gather, parts[1:])
        tokens, prompt_lens, mask, mine = rollout.tokens, rollout.prompt_lens, rollout.mask, distributed.share(rollout)
        (B, R), n_tokens, lens = mask.shape, mask.sum(), rollout.lens.cpu()
        ended = tokens.gather(1, (rollout.lens - 1).unsqueeze(1)).squeeze(1) == eos
        sec_rollout = clock.lap()

        # Where the task can judge itself: what the labeller would have thought, on the policy that sampled.
        last, judged = iteration == config.max_iters, {}
        if config.data == "atlas":
            judged |= atlas.judge(texts)
            if last or iteration == 1 or iteration % config.sample_interval == 0:
                rng = common.generator(device, config.seed, "heldout")
                judged["gold_heldout"] = atlas.judge(roll_out(policy, heldout, rng)[1])["gold"]
            clock.lap()

        # -- score: every response token under the policy that sampled it, the reference and the critic
        old_logprobs, old_values, entropy = map(distributed.gather, rescore(policy, mine))
        ref_logprobs = distributed.gather(rescore(reference, mine)[0])
        if critic:
            old_values, = map(distributed.gather, rescore(critic, mine, lambda *rows: (value_tokens(*rows),)))
        kl = masked_mean(kl_estimate(old_logprobs, ref_logprobs), mask) * n_tokens / B  # nats per response
        sec_score = clock.lap()

        # -- shape rewards: the score at the end, the KL along the way
        kl_coef = controller.value
        rewards = shape_rewards(scores - config.eos_penalty * ~ended, old_logprobs, ref_logprobs, mask,
                                kl_coef if config.kl_in == "reward" else 0.0)

        # -- GAE: how much better than expected was each token; whitened once, over the whole rollout. The objectives
        # without a baseline stay as they are, because whitening would give them one: the mean.
        advantages, returns = token_advantages(config.objective, rewards, old_values, mask, config.gamma, config.lam,
                                               config.samples_per_prompt if config.advantage == "group" else None)
        if config.objective not in ("reinforce", "reward_to_go"):
            advantages = whiten(advantages, mask)

        # -- epochs x minibatches. The first epoch keeps the order that the old log-probs were computed in, so that the
        # first ratio is exactly 1; the prompts came in random order anyway.
        rng = common.generator("cpu", config.seed, "minibatches", iteration)
        epochs = [torch.arange(B)] + [torch.randperm(B, generator=rng) for _ in range(config.epochs - 1)]
        stats, peaks, steps, grad_norms = defaultdict(float), defaultdict(float), 0, 0.0
        for n, minibatch in enumerate(torch.cat(epochs).split(minibatch_size), start=1):
            n_minibatch, approx_kl, minibatch_loss = mask[minibatch].sum(), 0.0, 0.0
            for i, T in data.like_lengths(lens, distributed.share(minibatch), micro, device):
                with autocast():
                    logprobs, values, ent = score_tokens(policy, tokens[i, :T], prompt_lens[i], R)
                    if critic:
                        values = value_tokens(critic, tokens[i, :T], prompt_lens[i], R)
                pg_loss, pg_stats = surrogate_loss(config.objective, logprobs, old_logprobs[i], advantages[i], mask[i],
                                                   config.clip, penalty and penalty.value)
                vf_loss, vf_stats = value_loss(values, old_values[i], returns[i], mask[i], config.value_clip)
                loss = pg_loss + (config.vf_coef or 0.0) * vf_loss
                if config.ent_coef:  # else its gradient, as large as all the logits, would be computed to be weighed 0
                    loss = loss - config.ent_coef * masked_mean(ent, mask[i])
                if config.kl_in == "loss":
                    kl_loss = masked_mean(kl_estimate(logprobs, ref_logprobs[i], config.kl_kind or "k2"), mask[i])
                    loss = loss + kl_coef * kl_loss
                # Weighed by its share of tokens: the gradient is the token mean of the minibatch however it is split.
                share = mask[i].sum() / n_minibatch
                (loss * share).backward()

                minibatch_loss += loss.detach() * share
                approx_kl += pg_stats["approx_kl"] * share
                if n == 1:
                    off_one = (log_ratio(logprobs, old_logprobs[i], mask[i]).detach().exp() - 1).abs().max()
                    peaks["ratio_first"] = max(peaks["ratio_first"], off_one)
                peaks["ratio_max"] = max(peaks["ratio_max"], pg_stats.pop("ratio_max"))
                for name, value in {"policy_loss": pg_loss, "value_loss": vf_loss, **pg_stats, **vf_stats}.items():
                    stats[name] += value.detach() * share
            minibatch_loss, approx_kl = distributed.total(minibatch_loss, approx_kl)
            if config.target_kl is not None and n > 1 and approx_kl > config.target_kl:
                optimizer.zero_grad()  # the policy is far enough from the one that sampled: end the epochs here
                break
            lr, grad_norm = optimizer.step(iteration, minibatch_loss)
            steps, grad_norms = steps + 1, grad_norms + grad_norm
        stats = {name: value / n for name, value in zip(stats, distributed.total(*stats.values()))}
        stats |= zip(peaks, distributed.largest(*peaks.values()))
        controller.update(kl.item(), B)
        if penalty:
            stats["penalty"] = penalty.value
            penalty.update(approx_kl.item())  # of the last minibatch, after all steps but its own
        sec_update = clock.lap()

        # -- log, sample, save
        gap = (rollout.logprobs - old_logprobs)[mask].abs()
        row = metrics.write(iteration, {
            "episodes": iteration * B, "score": scores.mean(), "kl": kl, "reward": rewards.sum() / B, **judged, **stats,
            "entropy": masked_mean(entropy, mask), "grad_norm": grad_norms / steps, "optimizer_steps": steps,
            "explained_variance": explained_variance(old_values, returns, mask), "response_len": n_tokens / B,
            "eos_rate": ended.float().mean(), "kl_coef": kl_coef, "lr": lr, "skipped_steps": optimizer.skipped,
            "logprob_gap": gap.mean(), "logprob_gap_max": gap.max(), "sec_rollout": sec_rollout,
            "sec_score": sec_score, "sec_update": sec_update,
            "tokens_per_s": n_tokens / (sec_rollout + sec_score + sec_update)}, {
            "score": "+.2f", "kl": ".2f", "gold": ".3f", "entropy": ".2f", "clip_frac": ".3f",
            "explained_variance": "+.2f", "response_len": ".1f", "eos_rate": ".2f", "gold_heldout": ".3f"})
        if iteration % config.sample_interval == 0 and not last:
            for prompt, response, score, k in show(policy, questions[:3], "samples"):
                print(f"    score {score:+.2f}  kl {k:5.2f}  {prompt!r} -> {response!r}")
        if run.due(iteration):
            run.save(iteration, kl_coef=controller.value, penalty=penalty and penalty.value)

    print("\nthe same questions before (SFT) and after (PPO): score, KL to the SFT policy, one sampled answer")
    for before, after in zip(show(reference, questions, "table"), show(policy, questions, "table")):
        print(before[0])
        for name, (_, response, score, k) in (("before", before), ("after", after)):
            print(f"    {name:<7}{score:+6.2f}  {k:6.2f}  {response!r}")
    print(f"train_ppo: wrote {run.path}")
    return row


if __name__ == "__main__":
    common.main(train, Config, __doc__, data.DataError)
