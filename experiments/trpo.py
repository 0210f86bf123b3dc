"""
TRPO for a language-model policy: what PPO's clip replaces. Each rollout gives one step along an approximate natural
gradient (damped, a few iterations of conjugate gradient, the Fisher matrix of some rows). The step is as long as a
quadratic approximation of the KL allows. It is then shrunk until the measured mean KL(pi_old || pi) per token is at
most --delta and the surrogate rises.

    python train_ppo.py --max_iters=1                  makes out/atlas/sft.pt and rm.pt if they are missing
    python -m experiments.trpo --out_dir=out/atlas     adds trpo.pt, and lines of stage trpo to metrics.jsonl

Shapes: B responses of at most R tokens, V vocabulary, N policy parameters; vectors in parameter space are flat (N,).
One pass reads the rollout and keeps its distributions (B, R, V), so this is for models of the built-in task's size.

Sources: [TRPO] Schulman et al. 2015, 1502.05477, section 6 and appendix C; the natural gradient: Kakade 2001.
"""

from dataclasses import dataclass
from typing import Optional

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import atlas
import data
from experience import Experience, HeldOut
from model import upcast
from ppo import cpi_loss, gae, masked_mean, shape_rewards, value_loss, whiten
from rollout import cooled, response_states
from support.checkpoint import load_finished, open_run
from support.device import Clock, generator, setup
from support.flags import Flags, require, require_one_process, resolve_sizes, run_script
from support.metrics import Metrics, progress, rollout_metrics
from support.optimizer import Optimizer
from support.stages import load_policy, load_reward_model
from tokenizer import DataError, run_tokenizer


# ---------------------------------------------------------------------------------------------------------------------
# the step: functions of a list of parameters and of closures that read them

def flat_grad(scalar, params, **kwargs):
    """Gradient (N,) of a scalar; kwargs are torch.autograd.grad's (create_graph, retain_graph)."""
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(scalar, params, **kwargs)])


@torch.no_grad()
def set_flat(params, vector):
    for p, part in zip(params, vector.split([p.numel() for p in params])):
        p.copy_(part.view_as(p))


def fisher_vector_product(kl_grad, params, v):
    """F v (N,), for F the Hessian of the mean KL(pi_old || pi) at pi = pi_old, which is the Fisher matrix there.

    kl_grad (N,) is the gradient of that KL, made with create_graph=True: 0 in value, but its graph gives F v as the
    gradient of kl_grad . v [TRPO, appendix C.1], so that the N x N matrix is never formed."""
    return flat_grad(kl_grad @ v, params, retain_graph=True)


def conjugate_gradient(matvec, b, iters, tolerance=1e-10):
    """x (N,) with A x = b, for A symmetric and positive definite, known only as matvec(v) = A v. It starts from
    x = 0, so b = 0 gives 0. It ends after `iters` products, or earlier once |A x - b| <= tolerance * |b|."""
    x, residual = torch.zeros_like(b), b.clone()
    direction, squared = residual, residual @ residual
    enough = tolerance ** 2 * squared
    for _ in range(iters):
        if squared <= enough:
            break
        product = matvec(direction)
        size = squared / (direction @ product)
        x = x + size * direction
        residual = residual - size * product
        before, squared = squared, residual @ residual
        direction = residual + squared / before * direction
    return x


@torch.no_grad()
def line_search(params, step, surrogate_fn, kl_fn, surrogate, delta, shrink=0.8, tries=10):
    """Moves params by the first of step, shrink * step, shrink^2 * step, ... that keeps kl_fn() <= delta and raises the
    surrogate above `surrogate`, its value before the step [TRPO, appendix C]. If none of `tries` does, params are
    restored bit for bit. Returns stats: step_fraction, surrogate_gain, approx_kl, all 0 if no step was accepted."""
    start = torch.cat([p.reshape(-1) for p in params])
    for fraction in (shrink ** n for n in range(tries)):
        set_flat(params, start + fraction * step)
        kl = kl_fn()
        if kl <= delta and (gain := surrogate_fn() - surrogate) > 0:  # NaN fails both
            return {"step_fraction": fraction, "surrogate_gain": gain, "approx_kl": kl}
    set_flat(params, start)
    return dict.fromkeys(("step_fraction", "surrogate_gain", "approx_kl"), 0.0)


def trpo_step(params, surrogate_fn, kl_fn, delta, damping, cg_iters, fisher_kl_fn=None):
    """One TRPO step on params (a list), in place. Returns line_search's stats, grad_norm and cg_residual.

    surrogate_fn() -> what to raise; kl_fn() -> mean KL(pi_old || pi), 0 at the present params. fisher_kl_fn: the same
    mean over fewer rows, for the Fisher matrix only [TRPO, appendix C.1]; the constraint applies to kl_fn.

    The direction d solves (F + damping) d = g, and sqrt(2 delta / d.F d) d is where the KL's second-order
    approximation reaches delta. Damping bends the direction, but is left out of that length: it is not in the KL.
    The closures need twice differentiable attention: call this under sdpa_kernel(SDPBackend.MATH)."""
    surrogate = surrogate_fn()
    gradient = flat_grad(surrogate, params)
    kl_grad = flat_grad((fisher_kl_fn or kl_fn)(), params, create_graph=True)

    def damped(v):
        return fisher_vector_product(kl_grad, params, v) + damping * v

    direction = conjugate_gradient(damped, gradient, cg_iters)
    product = fisher_vector_product(kl_grad, params, direction)
    step = (2 * delta / (direction @ product)).sqrt() * direction
    stats = {"grad_norm": gradient.norm(),
             "cg_residual": (product + damping * direction - gradient).norm() / gradient.norm()}
    return stats | line_search(params, step, surrogate_fn, kl_fn, surrogate.detach(), delta)


def response_distributions(model, tokens, prompt_lens, R, temperature):
    """log pi over the whole vocabulary, (B, R, V), in the states that score_response reads its log-probs from."""
    hidden, _ = response_states(model, tokens, prompt_lens, R)
    return torch.log_softmax(upcast(model.policy_head(cooled(hidden, temperature))), dim=-1)


def token_kl(old, new):
    """KL(old || new) in each state, (B, R), of log-distributions (B, R, V): an exact sum over the vocabulary."""
    return (old.exp() * (old - new)).sum(-1)


# ---------------------------------------------------------------------------------------------------------------------
# the loop

@dataclass
class Config(Flags):
    init_from: Optional[str] = None  # the SFT checkpoint, start and reference of the policy; default: out_dir/sft.pt
    rm: Optional[str] = None         # the reward model's checkpoint, also the critic's start; default: out_dir/rm.pt
    dtype: str = "float32"           # only float32: the line search compares differences that bfloat16 cannot hold
    max_iters: int = 80              # [1, inf) rollouts, and so steps of the policy
    batch_size: int = 256            # [1, inf) responses per rollout
    delta: float = 0.01              # (0, inf) largest mean KL(pi_old || pi) of a step, nats per token
    damping: float = 1.0             # [0, inf) added to the Fisher matrix's diagonal; turns the step to the gradient
    cg_iters: int = 5                # [1, inf) Fisher-vector products per step
    fisher_rows: int = 64            # [1, inf) responses that the Fisher matrix is measured on; at most batch_size
    minibatches: int = 4             # [1, inf) the critic's optimizer steps per epoch
    epochs: int = 2                  # [1, inf) the critic's passes over a rollout
    lr: float = 2e-4                 # [0, inf) the critic's learning rate; the policy's step size is delta
    max_new_tokens: int = 16         # [1, inf) longest response; one that is cut there gets eos_penalty
    temperature: float = 1.0         # (0, inf) of the sampled distribution, and so of every log-prob
    kl_coef: float = 0.05            # [0, inf) price of a nat of KL to the reference in std of the SFT score
    gamma: float = 1.0               # [0, 1] discount per token
    lam: float = 0.95                # [0, 1] GAE: 1 trusts the rewards, 0 the critic
    eos_penalty: float = 1.0         # [0, inf) taken off the score of a response without EOS, in standard deviations
    log_interval: int = 5            # [1, inf) iterations between lines on the screen; metrics.jsonl gets every one

    def check(self):
        super().check()
        require(self.dtype == "float32", f"--dtype={self.dtype} must be float32: the line search compares differences "
                                         "that bfloat16 cannot hold")
        rows = f"--batch_size={self.batch_size}"
        require(self.batch_size % self.minibatches == 0, f"{rows} must be a multiple of --minibatches="
                f"{self.minibatches}")
        require(self.fisher_rows <= self.batch_size, f"{rows} must be --fisher_rows={self.fisher_rows} or more")
        require_one_process("TRPO")
        require(not self.compile, "--compile is not for TRPO: a compiled pass cannot be differentiated twice")
        require(not self.recompute, "--recompute is not for TRPO, which differentiates a pass twice: lower "
                "--batch_size when memory runs out")
        require(self.micro_batch_size is None, "--micro_batch_size is not for TRPO, which reads a rollout "
                "whole: lower --batch_size when memory runs out")


def train(config):
    """Runs TRPO from finished sft.pt and rm.pt; writes out_dir/trpo.pt and returns the final metrics."""
    config.check()
    with open_run(config, "trpo") as run:
        return loop(config, run)


@sdpa_kernel(SDPBackend.MATH)  # fused attention has no second derivative, and one kernel for all passes keeps KL(old) 0
def loop(config, run):
    """The loop of train_ppo.py with another update; `run` restores and saves the checkpoint."""
    sft = load_finished(config.init_from or config.folder / "sft.pt", "sft")
    encoding, tokenizer = run_tokenizer(config.tokenizer, config.data, sft["tokenizer"])
    block_size = resolve_sizes(config, sft["model_config"])["block_size"]
    with progress(f"reading {config.data}"):
        split = data.load_prompts(config.data, encoding, block_size, config.max_new_tokens, config.skip_bad)
    device, autocast = setup(config)
    reward_model, rm = load_reward_model(config, tokenizer, block_size, device)

    policy, reference = (load_policy(sft, device) for _ in range(2))
    critic, params = reward_model.as_critic(), list(policy.trunk.parameters())
    optimizer = Optimizer(critic.parameters(), config)
    start, _ = run.begin(optimizer, {"model": policy, "critic": critic}, tokenizer,
                         {"sft": sft["sha256"], "rm": rm["sha256"]})
    experience = Experience(config, encoding, device, autocast, config.batch_size)
    reward_fn, evaluator = experience.reward_fn(reward_model), atlas.evaluate if config.data == "atlas" else None
    heldout = HeldOut(experience, split, reference, reward_fn, evaluator=evaluator)
    order = data.BatchOrder([1] * len(split.train), config.batch_size, config.seed)
    print(f"trpo: {policy.n_params:,} parameters; {config.data}: {'; '.join(split.report)}")
    metrics, row = Metrics(config, "trpo", start), {}
    for iteration in range(start + 1, config.max_iters + 1):
        clock, last = Clock(device), iteration == config.max_iters

        # -- sample, recompute, rewards and advantages, as in train_ppo.py
        prompts = [split.train[i] for i in order.order(iteration - 1)]
        rollout, texts = experience.collect(policy, prompts, experience.rng("rollout", iteration))
        (scores, _), has_eos = reward_fn(rollout, texts), rollout.has_eos(experience.eos)
        tokens, prompt_lens, mask = rollout.tokens, rollout.prompt_lens, rollout.mask
        B, R = mask.shape
        clock.lap("sec_rollout")
        task_metrics = heldout.task(texts) | (heldout.look(policy)[0] if last or iteration == 1 else {})
        clock.lap()

        passes = [[(torch.arange(B, device=device), tokens.size(1), 1.0)]]  # the step below differentiates one pass
        old_logprobs, _, entropy = experience.recompute(policy, rollout, passes, entropy=True)
        ref_logprobs, _ = experience.recompute(reference, rollout, passes)
        old_values = experience.recompute_values(critic, rollout, passes)
        with torch.no_grad():
            old_distributions = response_distributions(policy, tokens, prompt_lens, R, config.temperature)
        final_rewards = scores - config.eos_penalty * ~has_eos
        rewards = shape_rewards(final_rewards, old_logprobs, ref_logprobs, mask, config.kl_coef)
        advantages, returns = gae(rewards, old_values, mask, config.gamma, config.lam)
        advantages = whiten(advantages, mask) * (final_rewards.max() > final_rewards.min())
        clock.lap("sec_score")

        # -- one natural step of the policy
        def loss():
            logprobs, _, _ = experience.score_response(policy, tokens, prompt_lens, R, entropy=False)
            return cpi_loss(logprobs, old_logprobs, advantages, mask)

        def mean_kl(rows=B):
            new = response_distributions(policy, tokens[:rows], prompt_lens[:rows], R, config.temperature)
            return masked_mean(token_kl(old_distributions[:rows], new), mask[:rows])

        optimizer.calls += 1  # the weights change from here on, so an error must not save them as the last iteration's
        stats = trpo_step(params, lambda: -loss()[0], mean_kl, config.delta, config.damping, config.cg_iters,
                          fisher_kl_fn=lambda: mean_kl(config.fisher_rows))
        with torch.no_grad():
            stats = loss()[1] | stats  # the ratios after the step; of the two approx_kl, the exact one

        # -- epochs x minibatches of the critic
        rng, critic_loss = generator("cpu", config.seed, "minibatches", iteration), 0.0
        epochs = torch.cat([torch.randperm(B, generator=rng) for _ in range(config.epochs)]).to(device)
        for i in epochs.split(B // config.minibatches):
            values = experience.score_values(critic, tokens[i], prompt_lens[i], R)
            vf_loss, _ = value_loss(values, old_values[i], returns[i], mask[i], clip=None)
            vf_loss.backward()
            critic_loss += vf_loss.detach() / (config.epochs * config.minibatches)
            lr, _ = optimizer.step(iteration, vf_loss.detach())
        clock.lap("sec_update")

        measured = rollout_metrics(rollout, has_eos, scores, rewards, old_logprobs, ref_logprobs, old_values, entropy,
                                   config.gamma)
        row = metrics.write(iteration, measured | task_metrics | stats | clock.seconds | {
            "episodes": iteration * B, "value_loss": critic_loss, "kl_coef": config.kl_coef, "lr": lr,
            "skipped_steps": optimizer.skipped})
        run.end(iteration)
    print(f"trpo: wrote {run.path}")
    return row


if __name__ == "__main__":
    run_script(train, Config, __doc__, DataError)
