"""
Stage 2: PPO. Samples answers, scores them, and raises the probability of the tokens that did better than the critic
expected. The KL to the SFT policy keeps the text close to what the reward model was trained to judge.

    python train_ppo.py                                  everything on the built-in task; makes sft.pt and rm.pt first
    python train_ppo.py --reward=my_reward.py:f          any function f(prompts, responses) -> list of floats
    python train_ppo.py --reward=... --eval=my_eval.py:f     and a measure of your own on held-out prompts
    python train_ppo.py --init_from=sft.pt --rm=rm.pt --data=pairs.jsonl --lr=1e-5 --compile       on a GPU
    python train_ppo.py --resume --max_iters=200         continue from out_dir/ppo.pt

An iteration of `loop` has five parts:
    1 sample                    a response to each prompt, and one score for each response
    2 recompute                 log-probs and values of each response token under policy, reference and critic
    3 rewards and advantages    score and KL per token; how much better than expected each token was
    4 update                    epochs x minibatches of the clipped loss
    5 log                       metrics, checkpoint, samples

Shapes: B = batch_size responses. R = tokens of the longest response in the rollout. T = tokens of the longest prompt +
response, of the rollout or of one forward pass. The mathematics is in ppo.py.
"""

from dataclasses import dataclass
from itertools import chain
from typing import Optional

import torch

import atlas
import train_rm
import train_sft
from data import BatchOrder
from experience import Experience, HeldOut, load_reward_function, sides_with_rows
from ppo import (KLController, gae, group_advantages, kl_estimate, masked_mean, policy_loss, ratio_error, reward_to_go,
                 shape_rewards, value_loss, whiten)
from support import distributed, stages
from support.checkpoint import open_run
from support.device import Clock, generator, setup
from support.flags import Flags, check_ppo, run_script
from support.metrics import (Averages, Metrics, only_looking, print_before_after, print_samples, progress,
                             rollout_metrics)
from support.optimizer import Optimizer
from tokenizer import DataError


@dataclass
class Config(Flags):
    # models
    init_from: Optional[str] = None  # SFT checkpoint or pretrained weights, also the reference; default: sft.pt
    rm: Optional[str] = None         # the reward model's checkpoint; default: out_dir/rm.pt
    reward: str = "rm"               # rm, or path/to/file.py:function, f(prompts, responses[, rows]) -> list of floats
    eval: Optional[str] = None       # a function as for --reward, measured on held-out prompts and never trained on
    critic: Optional[str] = None     # separate|shared: a network, or a head on the policy; default: separate
    # rollouts
    max_iters: int = 90              # [1, inf) rollouts; enough once score - kl_coef * kl is flat
    batch_size: int = 256            # [1, inf) responses per rollout; more is steadier
    samples_per_prompt: int = 1      # [1, inf) responses to each prompt of a rollout; --advantage=group needs 2 or more
    max_new_tokens: Optional[int] = None  # [1, inf) longest response; default: 16; from a file, its 95 % quantile
    temperature: float = 1.0         # (0, inf) sampling temperature; every log-prob uses it, too
    # rewards and advantages
    kl_coef: float = 0.05            # [0, inf) score units (rm: SFT stds) per nat of KL; 0 invites reward hacking
    kl_target: Optional[float] = None  # (0, inf) adapt kl_coef to this KL, by at most 20 % per 10,000 responses
    kl_in: str = "reward"            # reward|loss: subtract it from each token's reward, or add it to the loss
    kl_kind: Optional[str] = None    # k2|k3: in the loss, gradient of KL(policy||SFT) or KL(SFT||policy); default: k2
    eos_penalty: float = 1.0         # [0, inf) taken off the score of a response without EOS; score units
    advantage: str = "gae"           # gae|group: group subtracts the mean of the prompt's other responses (RLOO)
    gamma: float = 1.0               # [0, 1] discount per token; below 1 favours short answers
    lam: float = 0.95                # [0, 1] GAE: 1 trusts the rewards, 0 the critic
    # update
    epochs: int = 1                  # [1, inf) times each rollout is used; more is farther off-policy
    minibatches: int = 4             # [1, inf) optimizer steps per epoch
    clip: float = 0.2                # (0, 1) PPO's epsilon: no gradient past 1 +- clip in the advantage's direction
    value_clip: Optional[float] = None  # (0, inf) clip range of the values, in score units; default: off
    vf_coef: float = 0.1             # [0, inf) weight of the value loss; matters most with --critic=shared
    ent_coef: float = 0.0            # [0, inf) weight of the entropy bonus; 0.01 when entropy collapses early
    target_kl: Optional[float] = None  # (0, inf) end the update at this approx_kl, nats per token; default: off
    lr: Optional[float] = None       # [0, inf) default: 4e-4, for width 128; 5e-6 from pretrained weights
    # screen
    log_interval: int = 5            # [1, inf) iterations between lines; metrics.jsonl gets every one
    sample_interval: int = 20        # [1, inf) iterations between samples, and between looks at held-out questions

    def resolved(self):
        """The config with the defaults that depend on other flags."""
        return self.replace(critic=self.critic or ("separate" if self.advantage == "gae" else None),
                            kl_kind=self.kl_kind or ("k2" if self.kl_in == "loss" else None))

    def check(self):
        check_ppo(self)


def train(config, rung=None):
    """Runs the stages that are missing, then PPO; writes out_dir/ppo.pt and returns the final metrics. A `rung`, an
    earlier step of the derivation, has other advantages and another loss: to read PPO, skip each `if rung`."""
    config.check()
    with open_run(config.resolved(), "ppo") as run:
        return loop(run.config, run, rung)


def prepare_run(config, run):
    """Trains missing stages, loads models and prompts, restores a checkpoint with --resume, prints what will run.
    `start` is the last finished iteration, `saved` the checkpoint's other fields."""
    reward_function, eval_function = load_reward_function(config.reward), load_reward_function(config.eval, "eval")
    rows_for = sides_with_rows(reward_function, eval_function)
    encoding, tokenizer, split = stages.prepare(config, rows_for, sft=train_sft, rm=train_rm)
    device, autocast = setup(config)
    models = stages.load_models(config, tokenizer, device, autocast)
    experience = Experience(config, encoding, device, autocast, *stages.rows_per_pass(config, models, split, device))
    trained = {"model": models.policy} | ({"critic": models.critic} if models.critic else {})
    optimizer = Optimizer(models.policy.parameters(), config, models.critic.parameters() if models.critic else ())
    start, saved = run.begin(optimizer, trained, tokenizer, models.sources)
    reward_fn = experience.reward_fn(reward_function or models.reward_model)
    task = atlas.evaluate if config.data == "atlas" else None
    heldout = HeldOut(experience, split, models.reference, reward_fn, eval_function, task)
    stages.print_summary(config, models, experience, split, len(heldout.prompts))
    return models, reward_fn, experience, split, heldout, optimizer, start, saved


def loop(config, run, rung):
    """The five parts, max_iters times; `run` restores and saves the checkpoint."""
    models, reward_fn, experience, split, heldout, optimizer, start, saved = prepare_run(config, run)
    policy, reference = models.policy, models.reference
    critic = models.critic  # None with --critic=shared, a head on the policy, and with --advantage=group
    controller = KLController(saved.get("kl_coef", config.kl_coef), config.kl_target)
    order = BatchOrder(range(len(split.train)), config.batch_size // config.samples_per_prompt, config.seed)
    if rung:
        rung.load(saved)
    metrics, row = Metrics(config, "ppo", start), {}
    for iteration in range(start + 1, config.max_iters + 1):
        clock, last = Clock(experience.device), iteration == config.max_iters

        # -- 1 sample: a response to each prompt, by the current policy, and the score of each response
        prompts = [split.train[i] for i in order.order(iteration - 1) for _ in range(config.samples_per_prompt)]
        rng = experience.rng("rollout", iteration)
        rollout, texts = experience.collect(policy, prompts, rng, config.samples_per_prompt)
        scores, parts = reward_fn(rollout, texts)
        tokens, prompt_lens, mask = rollout.tokens, rollout.prompt_lens, rollout.mask
        (B, R), has_eos = mask.shape, rollout.has_eos(experience.eos)
        final_rewards = scores - config.eos_penalty * ~has_eos
        if iteration == 1 and config.critic and config.reward != "rm":  # begin at the mean reward
            (critic or policy).value_head.shift(masked_mean(final_rewards.unsqueeze(1).expand(B, R), mask).item())
        clock.lap("sec_rollout")
        look = last or iteration == 1 or iteration % config.sample_interval == 0
        task_metrics = heldout.task(texts) | {name: part.mean() for name, part in parts.items()}
        looked, samples = heldout.look(policy) if look else ({}, [])
        clock.lap()

        # -- 2 recompute: every response token under the policy that sampled it, the reference and the critic. `passes`
        # has for each minibatch a list of micro-batches (rows, T, token_fraction)
        passes = experience.minibatch_passes(rollout)
        old_logprobs, old_values, entropy = experience.recompute(policy, rollout, passes, entropy=True)
        ref_logprobs, _ = experience.recompute(reference, rollout, passes)
        if critic:
            old_values = experience.recompute_values(critic, rollout, passes)
        clock.lap("sec_score")

        # -- 3 rewards and advantages: the score on the last token and the KL on each; how much better than the critic
        # expected each token was; whitened once, over the whole rollout
        kl_coef = controller.value
        rewards = shape_rewards(final_rewards, old_logprobs, ref_logprobs, mask,
                                kl_coef if config.kl_in == "reward" else 0.0)
        advantages, returns = gae(rewards, old_values, mask, config.gamma, config.lam)
        if config.advantage == "group":  # without a critic the returns above reach no gradient
            response_returns = reward_to_go(rewards, mask, config.gamma)[:, 0]  # (B,)
            advantages = group_advantages(response_returns, config.samples_per_prompt, mask)
        advantages = whiten(advantages, mask)
        if rung:  # an objective of the derivation instead of PPO's
            advantages, returns = rung.advantages(rewards, old_values, mask)
        # If all compared scores are equal, none favours a token: whitening would only blow up KL terms and rounding
        compared = final_rewards.view(-1, config.samples_per_prompt if config.advantage == "group" else B)
        advantages = advantages * (compared.amax(1) > compared.amin(1)).any()

        # -- 4 update: epochs x minibatches. The first epoch repeats the forward passes of part 2: same rows, same
        # padding, same rounding. So every ratio is exactly 1 before the first step, in float32 on a CPU to the last bit
        rng = generator("cpu", config.seed, "minibatches", iteration)
        shuffles = [torch.randperm(B, generator=rng) for _ in range(config.epochs - 1)]
        epochs = [passes] + [experience.minibatch_passes(rollout, shuffle) for shuffle in shuffles]
        averages, steps, grad_norms = Averages(), 0, 0.0
        for n, minibatch in enumerate(chain(*epochs), start=1):
            total_loss, approx_kl = 0.0, 0.0
            for rows, T, token_fraction in minibatch:  # gradient accumulation over micro-batches
                logprobs, values, ent = experience.score_response(policy, tokens[rows, :T], prompt_lens[rows], R,
                                                                  entropy=config.ent_coef > 0)
                if critic:
                    values = experience.score_values(critic, tokens[rows, :T], prompt_lens[rows], R)
                pg_loss, stats = policy_loss(logprobs, old_logprobs[rows], advantages[rows], mask[rows], config.clip)
                if rung:
                    pg_loss, stats = rung.loss(logprobs, old_logprobs[rows], advantages[rows], mask[rows])
                vf_loss, vf_stats = value_loss(values, old_values[rows], returns[rows], mask[rows], config.value_clip)
                loss = pg_loss + (config.vf_coef * vf_loss if config.critic else 0.0)
                if config.ent_coef:
                    loss = loss - config.ent_coef * masked_mean(ent, mask[rows])
                if config.kl_in == "loss":
                    kl = kl_estimate(logprobs, ref_logprobs[rows], config.kl_kind)
                    loss = loss + kl_coef * masked_mean(kl, mask[rows])
                (loss * token_fraction).backward()

                total_loss += loss.detach() * token_fraction
                approx_kl += stats["approx_kl"] * token_fraction
                averages.add(token_fraction, policy_loss=pg_loss, value_loss=vf_loss, **stats, **vf_stats)
                if n == 1:
                    averages.add(1, ratio_first=ratio_error(logprobs, old_logprobs[rows], mask[rows]))
            total_loss, approx_kl = distributed.all_reduce_sum(total_loss, approx_kl)
            if config.target_kl is not None and n > 1 and approx_kl > config.target_kl:
                optimizer.zero_grad()  # the policy is far enough from the one that sampled: end the epochs here
                break
            lr, grad_norm = optimizer.step(iteration, total_loss)  # no step if a number is not finite
            steps, grad_norms = steps + 1, grad_norms + grad_norm
        clock.lap("sec_update")

        # -- 5 log: metrics, checkpoint, samples
        measured = rollout_metrics(rollout, has_eos, scores, rewards, old_logprobs, ref_logprobs, old_values, entropy,
                                   config.gamma)
        controller.update(measured["kl"].item(), B)
        row = metrics.write(iteration, measured | task_metrics | looked | averages.reduce(n) | clock.seconds | {
            "episodes": iteration * B, "kl_coef": kl_coef, "lr": lr, "grad_norm": grad_norms / steps,
            "optimizer_steps": steps, "skipped_steps": optimizer.skipped,
            "tokens_per_s": mask.sum() / sum(clock.seconds.values())} | (rung.end(approx_kl) if rung else {}),
            samples)
        run.end(iteration, kl_coef=controller.value, **(rung.state() if rung else {}))
        if iteration % config.sample_interval == 0 and not last:
            print_samples(samples[:3])

    with progress("answering the same questions before and after"), only_looking():
        print_before_after(*(experience.preview(model, reference, reward_fn, split.examples(10), "table")
                             for model in (reference, policy)))
    print(f"train_ppo: wrote {run.path}")
    return row


if __name__ == "__main__":
    run_script(train, Config, __doc__.split("\n\nAn iteration")[0], DataError)
