"""
Responses from a policy: sampling them (generate), and scoring them again under any policy (score_response).

Shapes: B prompts of at most P tokens, responses of at most R tokens, T = P + R, V vocabulary. Every sequence is
stored without gaps: prompt, response, right padding. Response-aligned tensors are (B, R): column t belongs to the
t-th sampled token and is read off the model at the position before it, prompt_lens - 1 + t.

There is no top-k, no top-p and no minimum length: PPO's ratio and the KL are only right if the distribution that is
sampled is the one that is scored. Temperature is safe, because both sides divide the logits by it (cooled).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from model import KVCache, upcast

GROWTH = 32  # slots added to the KV cache at a time: each step reads unused slots, too, and each growth is a copy


@dataclass
class Rollout:
    tokens: torch.Tensor         # (B, T) long, right-padded with EOS
    prompt_lens: torch.Tensor    # (B,) long
    response_lens: torch.Tensor  # (B,) long, EOS included
    mask: torch.Tensor           # (B, R) bool, True on response tokens; made from lengths, so a sampled EOS counts
    logprobs: torch.Tensor       # (B, R) log pi(token) as sampled; 0 where masked
    values: torch.Tensor         # (B, R) value head at the state each token was sampled from; 0 where masked

    @property
    def lens(self):
        """(B,) long: prompt and response together."""
        return self.prompt_lens + self.response_lens

    def has_eos(self, eos):
        """(B,) bool: whether the response ended by itself. Without EOS it was cut at max_new_tokens."""
        return is_eos(self.tokens.gather(1, (self.lens - 1).unsqueeze(1)).squeeze(1), eos)

    def as_ended(self, eos):
        """tokens (B, T or T + 1) and lens (B,) with an EOS after each response that was cut: a reward model has only
        learned to judge texts that end. The padding is EOS, so adding one to a cut row's length is enough."""
        cut = ~self.has_eos(eos)
        tokens = F.pad(self.tokens, (0, 1), value=first(eos)) if cut.any() else self.tokens
        return tokens, self.lens + cut

    def ids(self):
        """[(prompt, response)]: each row's real tokens, as lists of ids."""
        return [(row[:p], row[p:n]) for row, p, n in
                zip(self.tokens.tolist(), self.prompt_lens.tolist(), self.lens.tolist())]


def first(eos):
    """The EOS that is written: `eos` is an id, or a list of ids that all end a response."""
    return eos[0] if isinstance(eos, (list, tuple)) else eos


def is_eos(tokens, eos):
    """bool, of the shape of tokens: whether each ends a response."""
    ids = eos if isinstance(eos, (list, tuple)) else [eos]
    return torch.stack([tokens == token for token in ids]).any(0)


def cooled(hidden, temperature):
    """hidden (..., C) / temperature. The policy head is linear without a bias, so this divides the logits, too. To
    divide the logits themselves would read and write V numbers per token once more."""
    return hidden if temperature == 1 else hidden / temperature


@torch.no_grad()
def sample_tokens(model, prompts, prompt_lens, max_new_tokens, *, temperature=1.0, generator=None, copies=1):
    """The sampling loop: yields (token, logprob, value), each (B,), for step 0, 1, ... max_new_tokens - 1.

    Rows are ragged: row b's step-t token has position prompt_lens[b] + t, in the model's cache as in the
    output. The loop ignores EOS; its caller decides when to stop. If each prompt is repeated `copies` times in a row,
    the model reads it once.

    Raises ValueError, before any compute, for a bad temperature or length, or a context that would not fit."""
    P, longest = prompts.size(1), int(prompt_lens.max())
    block_size = model.config.block_size
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be above 0")
    if max_new_tokens < 1 or int(prompt_lens.min()) < 1 or longest > P:
        raise ValueError(f"need max_new_tokens >= 1 and 1 <= prompt_lens <= P={P}, got max_new_tokens="
                         f"{max_new_tokens} and prompt_lens from {int(prompt_lens.min())} to {longest}")
    if longest + max_new_tokens > block_size:
        raise ValueError(f"prompt of {longest} tokens + max_new_tokens={max_new_tokens} exceeds "
                         f"block_size={block_size}: shorten the prompt or lower max_new_tokens")
    device = prompts.device
    prompts = prompts[:, :longest]
    # Ids beyond a prompt are ignored, so they may be anything, even an id that the embedding does not have.
    prompts = torch.where(torch.arange(longest, device=device) < prompt_lens.unsqueeze(1), prompts, 0)
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else next(model.parameters()).dtype
    first, room = longest + GROWTH, longest + max_new_tokens
    if device.type != "cpu":  # if the slots are not a multiple of 16, attention on a GPU copies its mask in each layer
        first, room = (n + -n % 16 for n in (first, room))
    room = min(room, block_size)
    cache = KVCache(model.config, prompts.size(0), min(first, room), device, dtype, room, copies)

    # (B / copies, P, C); the cache now holds junk beyond each prompt, overwritten below
    hidden = model(prompts[::copies], cache=cache)
    positions = prompt_lens - 1
    hidden = hidden[torch.arange(len(prompts), device=device) // copies, positions].unsqueeze(1)  # (B, 1, C)
    for step in range(max_new_tokens):
        logits = upcast(model.policy_head(cooled(hidden[:, 0], temperature)))  # (B, V)
        logprobs = torch.log_softmax(logits, dim=-1)
        # Inverse-CDF sampling: one uniform number a row, several times cheaper than torch.multinomial. `right` finds
        # the first token whose cumulative probability exceeds u, so a token of probability 0 is never chosen.
        cdf = logprobs.exp().cumsum(-1)
        u = torch.rand(cdf.size(0), 1, device=device, dtype=cdf.dtype, generator=generator)
        token = torch.searchsorted(cdf, u * cdf[:, -1:], right=True).clamp(max=cdf.size(1) - 1)  # (B, 1)
        yield token[:, 0], logprobs.gather(1, token)[:, 0], upcast(model.value_head(hidden)[:, 0])
        if step + 1 < max_new_tokens:
            positions = positions + 1
            if longest + step + 1 > cache.max_len:
                cache.grow(min(cache.max_len + GROWTH, room))
            hidden = model(token, cache=cache, positions=positions)  # (B, 1, C)


@torch.no_grad()
def generate(model, prompts, prompt_lens, max_new_tokens, *, eos, temperature=1.0, generator=None, copies=1):
    """Samples one response for each of prompts (B, P) long, right-padded, prompt_lens (B,). Returns a Rollout.

    `eos` is the id that ends a response, or a list of such ids, the first of which is the padding. A response ends with
    the EOS it sampled, or is cut at max_new_tokens and then has none. R is the longest response produced. Ids in
    `prompts` beyond prompt_lens are ignored. If each prompt is repeated `copies` times in a row, the model reads it
    once. Raises ValueError for a context that would not fit (see sample_tokens) and FloatingPointError for logits that
    are not finite."""
    B, P = prompts.shape
    done = torch.zeros(B, dtype=torch.bool, device=prompts.device)
    response_lens = torch.zeros_like(prompt_lens)
    columns = []
    for step, column in enumerate(sample_tokens(model, prompts, prompt_lens, max_new_tokens,
                                                temperature=temperature, generator=generator, copies=copies)):
        token, logprob, _ = column
        columns.append(column)
        response_lens += ~done
        finite = (torch.isfinite(logprob) | done).all()
        done = done | is_eos(token, eos)
        finite, all_done = torch.stack([finite, done.all()]).tolist()  # the loop's one wait for the device per step
        if not finite:
            raise FloatingPointError(f"the policy's logits are not finite at step {step} of sampling: its weights hold "
                                     "NaN or inf, so go back to an earlier checkpoint and lower the learning rate")
        if all_done:
            break

    tokens, logprobs, values = (torch.stack(c, dim=1) for c in zip(*columns))  # each (B, R)
    R = tokens.size(1)
    mask = torch.arange(R, device=prompts.device) < response_lens.unsqueeze(1)
    # Each row's response moves to where its own prompt ends; the junk sampled after EOS is dropped.
    column = torch.arange(P + R, device=prompts.device).expand(B, -1)
    offset = column - prompt_lens.unsqueeze(1)  # index into the response, negative on the prompt
    padded = torch.cat([prompts, prompts.new_full((B, R), first(eos))], dim=1)
    full = torch.where(offset < 0, padded, tokens.gather(1, offset.clamp(0, R - 1)))
    full = torch.where(offset < response_lens.unsqueeze(1), full, first(eos))
    return Rollout(full, prompt_lens, response_lens, mask, logprobs.masked_fill(~mask, 0), values.masked_fill(~mask, 0))


def response_states(model, tokens, prompt_lens, R):
    """hidden (B, R, C) at the state each response token is sampled from, and positions (B, R) = prompt_lens - 1 + t."""
    hidden = model(tokens)  # (B, T, C)
    positions = prompt_lens.unsqueeze(1) - 1 + torch.arange(R, device=tokens.device)  # (B, R)
    positions = positions.clamp(max=tokens.size(1) - 1)  # beyond a short row's end: the caller masks it
    return hidden.gather(1, positions.unsqueeze(2).expand(-1, -1, hidden.size(2))), positions


class ChunkedHead(torch.autograd.Function):
    """logprobs and entropy (None if it is not asked for), each (N,), of targets (N,) under the softmax of hidden (N, C)
    times weight (V, C). Only the logits of `chunk` positions exist at a time. The backward pass computes them again.
    With V = 150,000, the logits of all positions are by far the largest tensor of a run.

    The weight is cast to hidden's dtype, and its gradient is added up in float32 or wider. Raises RuntimeError if it
    would be differentiated twice (create_graph)."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk, entropy):
        cast, dtype = weight.to(hidden.dtype), torch.promote_types(hidden.dtype, torch.float32)
        logprobs, H, total = (hidden.new_empty(len(hidden), dtype=dtype) for _ in range(3))
        for i in range(0, len(hidden), chunk):
            s = slice(i, i + chunk)
            logits = F.linear(hidden[s], cast).to(dtype)  # (chunk, V)
            total[s] = logits.logsumexp(-1)
            logits -= total[s, None]  # now log p
            logprobs[s] = logits.gather(1, targets[s, None])[:, 0]
            if entropy:
                H[s] = -(logits.exp() * logits.clamp_(min=-1e9)).sum(-1)
        ctx.save_for_backward(hidden, weight, targets, total, H)
        ctx.chunk = chunk
        return logprobs, H if entropy else None

    @staticmethod
    def backward(ctx, d_logprobs, d_H):
        if torch.is_grad_enabled():  # once_differentiable sees a second derivative only in d_logprobs and d_H
            raise RuntimeError("the policy head in chunks has no second derivative: score without chunks")
        hidden, weight, targets, total, H = ctx.saved_tensors
        cast, d_hidden = weight.to(hidden.dtype), torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=total.dtype) if ctx.needs_input_grad[1] else None
        for i in range(0, len(hidden), ctx.chunk):
            s = slice(i, i + ctx.chunk)
            log_p = F.linear(hidden[s], cast).to(total.dtype).sub_(total[s, None])
            # d log p(y) / d logits = [y] - p, and d H / d logits = -p (log p + H)
            p, slope = log_p.exp(), -d_logprobs[s, None]
            d = p * (slope if d_H is None else slope - d_H[s, None] * (log_p.clamp_(min=-1e9) + H[s, None]))
            d = d.scatter_add_(1, targets[s, None], d_logprobs[s, None]).to(hidden.dtype)
            d_hidden[s] = d @ cast
            if d_weight is not None:
                d_weight += d.t() @ hidden[s]
        return d_hidden, None if d_weight is None else d_weight.to(weight.dtype), None, None, None


@torch._disable_dynamo  # each number of chunks would need its own graph
def chunked_head(model, hidden, targets, chunk, entropy):
    """logprobs and entropy (or None), each (B, R), by ChunkedHead, in autocast's dtype if it is on."""
    if torch.is_autocast_enabled(hidden.device.type):  # cast by hand: it would be off in the backward pass
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    with torch.autocast(hidden.device.type, enabled=False):
        found = ChunkedHead.apply(hidden.flatten(0, 1), model.unembedding, targets.flatten(), chunk, entropy)
    return [x if x is None else x.view(targets.shape) for x in found]


def score_response(model, tokens, prompt_lens, R, temperature=1.0, entropy=True, chunk=None):
    """logprobs, values, entropy, each (B, R), of the R tokens after each prompt in tokens (B, T) under `model`. With
    entropy=False the third is None. With a `chunk`, the policy head reads that many positions at a time
    (ChunkedHead): the same numbers except for rounding, in less memory, but differentiable only once.

    The only place where tokens meet log-probs: the sampling policy, the reference and every update pass come through
    here, so the shift by one and the temperature are the same for all. The policy head sees response positions only
    (the logits are the largest tensor of the whole run), and the log-softmax is float32 or wider. Entropy is that of
    the whole distribution in nats. Entries beyond a row's response are finite but mean nothing."""
    hidden, positions = response_states(model, tokens, prompt_lens, R)
    targets = tokens.gather(1, (positions + 1).clamp(max=tokens.size(1) - 1))  # (B, R)
    values, hidden = upcast(model.value_head(hidden)), cooled(hidden, temperature)
    if chunk is not None:
        logprobs, H = chunked_head(model, hidden, targets, chunk, entropy)
        return logprobs, values, H
    all_logprobs = torch.log_softmax(upcast(model.policy_head(hidden)), dim=-1)  # (B, R, V)
    logprobs = all_logprobs.gather(2, targets.unsqueeze(2)).squeeze(2)
    # log 0 becomes a large finite number: 0 * it is 0, where 0 * -inf would be NaN, in the gradient as well
    H = -(all_logprobs.exp() * all_logprobs.clamp(min=-1e9)).sum(-1) if entropy else None
    return logprobs, values, H


def score_values(critic, tokens, prompt_lens, R):
    """values (B, R) of a separate critic, in the states that score_response reads the log-probs from."""
    hidden, _ = response_states(critic, tokens, prompt_lens, R)
    return upcast(critic.value_head(hidden))
