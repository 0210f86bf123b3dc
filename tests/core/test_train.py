"""
Tests of train_sft.py, train_rm.py and train_ppo.py on a tiny model: each stage learns, the ratio starts at 1, one
iteration of PPO does what the derivation says, and a resumed run equals one that was never stopped. float32 on one CPU
thread is deterministic, so "equal" means bit for bit unless a test says otherwise. Flags, the command line, reward
functions and the stages together are in ../test_train_*.py.
"""

import json
import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import atlas
import experience
import model
import rollout
import train_ppo
import train_rm
import train_sft
from data import collate_demonstrations, load_demonstrations
from experiments import rungs
from ppo import masked_mean, reward_to_go
from reward_model import RewardModel
from rollout import score_response
from support import device, distributed, optimizer, stages
from support.checkpoint import digest, load_checkpoint
from support.flags import UserError
from support.metrics import rollout_metrics
from tensors import make_gpt
from tiny import (CLOCKS, ONE_STEP, SIZES, STAGES, Spy, metrics, pairs, reward_file, run, settings, weights,
                  write_jsonl)
from tokenizer import encode_prompt, encode_response, get_tokenizer

LADDER = [ONE_STEP | {"objective": objective} for objective in ("reinforce", "reward_to_go", "baseline", "gae")] + \
         [{"objective": objective} for objective in ("cpi", "kl_penalty")] + \
         [{"advantage": "group", "samples_per_prompt": 4}]


# ----------------------------------------------------------------------------------------------------------
# each stage improves on its own step 0

def test_sft_lowers_the_loss_on_heldout_rows(world):
    folder = world("sft")
    run("sft", folder, max_iters=30, log_interval=1)
    losses = [row["heldout_loss"] for row in metrics(folder, "sft")]
    # before training: no opinion on 257 ids
    assert abs(metrics(folder, "sft")[0]["loss"] - math.log(257)) < 0.5
    assert losses[-1] < 0.7 * losses[0]


def test_heldout_rows_are_read_without_dropout(world):
    folder = world("sft")
    run("sft", folder, dropout=0.5, lr=0.0, log_interval=1)
    assert len({row["heldout_loss"] for row in metrics(folder, "sft")}) == 1
    assert len({row["loss"] for row in metrics(folder, "sft")}) == 4


def test_the_saved_sft_model_has_the_logged_loss_on_heldout_tokens(world):
    """EOS is one of them. The mean is over tokens: a mean over rows would weigh those of short answers more. The
    model is the averaged one. float32: two dozen roundings."""
    folder = world("sft")
    write_jsonl(folder / "pairs.jsonl", [row | {"chosen": row["chosen"] * (1 + i // 10)}
                                         for i, row in enumerate(pairs())])
    final = run("sft", folder, micro_batch_size=1, max_iters=8)
    policy = stages.load_policy(load_checkpoint(folder / "sft.pt", "sft"))
    rows = load_demonstrations(folder / "pairs.jsonl", get_tokenizer("bytes"), 64).heldout
    with torch.no_grad():
        logprobs = [rollout.score_response(policy, torch.tensor([row.prompt + row.response]),
                                           torch.tensor([len(row.prompt)]), len(row.response))[0][0] for row in rows]
    assert {row.response[-1] for row in rows} == {256} and len({len(row.response) for row in rows}) > 1
    assert final["heldout_loss"] == pytest.approx(-torch.cat(logprobs).mean().item(), rel=2e-6)


@torch.no_grad()
def test_knows_country_compares_whole_answers_and_no_padding(monkeypatch):
    """A share of questions: where the right answer is likelier than the wrong one, each scored by itself here."""
    encoding, pairs = get_tokenizer("atlas"), atlas.country_pairs("heldout")[:40]
    monkeypatch.setattr(atlas, "country_pairs", lambda split: pairs)
    policy = make_gpt(torch.float32, vocab_size=encoding.n_vocab, block_size=64).eval()

    def logprob(prompt, response):
        prompt, response = encode_prompt(encoding, prompt), encode_response(encoding, response)
        return rollout.score_response(policy, torch.tensor([prompt + response]), torch.tensor([len(prompt)]),
                                      len(response))[0].sum()
    expected = sum((logprob(prompt, right) > logprob(prompt, wrong)).item() for prompt, right, wrong in pairs)
    assert train_sft.knows_country(policy, encoding, "cpu") == pytest.approx(expected / 40, rel=1e-6)
    assert 0 < expected < 40 and expected != 20


@pytest.mark.parametrize("stage", ["sft", "rm"])
def test_each_step_takes_other_rows(stage, world):
    """With lr=0 nothing else changes the loss."""
    folder = world(stage)
    run(stage, folder, lr=0.0)
    assert len({row["loss"] for row in metrics(folder, stage)}) > 1


def test_the_reward_model_trains_without_the_dropout_of_sft(world):
    """Each batch is one row, six times, and lr is 0: only dropout could change the loss."""
    folder = world("sft")
    write_jsonl(folder / "pairs.jsonl", pairs()[:1])
    run("sft", folder, dropout=0.5), run("rm", folder, lr=0.0)
    assert len({row["loss"] for row in metrics(folder, "sft")}) == 4
    assert len({row["loss"] for row in metrics(folder, "rm")}) == 1


def test_the_average_is_judged_on_heldout_rows_and_calibrated_on_others(world, monkeypatch):
    """The average of the weights is the reward model, so its loss counts. The held-out prompts measure PPO, so answers
    to them must not set the zero and the unit of the score."""
    split, prompts, average, judged, calibrated = (Spy(monkeypatch, name, train_rm) for name in (
        "load_comparisons", "load_prompts", "update_average", "margins_of", "calibrate"))
    folder = world("rm")
    run("rm", folder, log_interval=1)
    rows, reward_model = metrics(folder, "rm"), average.calls[0][0][0]
    for row, ((scorer, comparisons, *_), margins) in zip(rows, judged.calls, strict=True):
        assert scorer is reward_model and comparisons == split.calls[0][1].heldout
        assert row["heldout_loss"] == pytest.approx((1 + (-margins).exp()).log().mean().item(), rel=1e-6)
        assert row["heldout_accuracy"] == (margins > 0).float().mean()
    assert any(row["heldout_accuracy"] != row["accuracy"] for row in rows)
    (_, scorer, _, asked), _ = calibrated.calls[0]
    assert scorer is reward_model and asked == prompts.calls[0][1].train


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_the_labeller_judges_each_pair_of_samples_that_differ(split, monkeypatch):
    """An answer that was sampled twice is judged twice against each different one. The chosen one comes first."""
    encoding, asked = get_tokenizer("atlas"), []
    peru, unsure = " It is in Peru.", " I do not know."
    monkeypatch.setattr(train_rm, "sample", lambda *args, copies: [
        encode_response(encoding, (peru, unsure, peru)[i % copies]) for i in range(len(args[2]) * copies)])
    monkeypatch.setattr(atlas, "label", lambda question, a, b, rng: asked.append((question, a, b)) or a == peru)
    made_by = SimpleNamespace(encoding=encoding, config=SimpleNamespace(seed=0, candidates=3))
    comparisons = train_rm.atlas_comparisons(made_by, None, split)
    assert [encoding.decode(row.prompt) for row in comparisons] == atlas.prompts(split)
    for row in comparisons:
        assert row.responses == [encode_response(encoding, answer) for answer in (peru, unsure)]
        assert row.pairs == [(0, 1), (0, 1)]
    assert asked == [(question, *pair) for question in atlas.prompts(split) for pair in ((peru, unsure),
                                                                                        (unsure, peru))]


@pytest.mark.parametrize("limit", [dict(SAMPLE_ROWS=7), dict(SAMPLE_BYTES=7.5 * 4 * 2 * 3 * 2 * 5 * 6)])
def test_the_samples_of_a_prompt_stand_together_and_all_end(monkeypatch, limit):
    """Of a chunk's rows all copies of a prompt are there: it is read once. A chunk's KV cache has a limit: for each
    answer float32 keys and values of 3 layers with 2 heads of 5 numbers, at 1 + 5 positions."""
    chunks = []

    def answer(policy, prompts, rng, copies):
        chunks.append((len(prompts), copies))
        return SimpleNamespace(ids=lambda: [(prompt, [*prompt, 9 if n % 2 else 5]) for n, prompt in enumerate(prompts)])
    for name, value in limit.items():
        monkeypatch.setattr(train_rm, name, value)
    encoding = get_tokenizer("atlas")
    pad = encoding.eot_token
    experience = SimpleNamespace(rng=lambda purpose: None, sample=answer, encoding=encoding, pad=pad,
                                 config=SimpleNamespace(max_new_tokens=5))
    policy = SimpleNamespace(config=model.GPTConfig(6, 10, n_layer=3, n_head=2, n_embd=10))
    answers = train_rm.sample(experience, policy, [[1], [2], [3]], "x", copies=3)
    assert [row[0] for row in answers] == [1, 1, 1, 2, 2, 2, 3, 3, 3] and chunks == [(6, 3), (3, 3)]
    assert all(row[-1] == pad for row in answers)


def test_rm_goes_below_the_loss_of_no_opinion(world):
    """On training pairs and on held-out ones."""
    folder = world("rm")
    final = run("rm", folder, max_iters=30)
    assert final["loss"] < 0.5 * math.log(2) and final["accuracy"] > 0.9
    assert final["heldout_loss"] < math.log(2)


def test_the_reward_model_averages_its_latest_weights(world, monkeypatch):
    """The average reaches over about the last tenth of the iterations. Weight 9 / (t + 8) on iteration t: a copy at
    first, and of 200 iterations the first 100 count for 0.2 %."""
    model, average = torch.nn.Linear(3, 1), torch.nn.Linear(3, 1)
    for iteration in range(1, 201):
        with torch.no_grad():
            model.weight.fill_(1.0 if iteration <= 100 else 0.0)
        optimizer.update_average(average, model, iteration)
        if iteration == 1:
            assert torch.equal(average.weight, model.weight) and torch.equal(average.bias, model.bias)
    assert (average.weight - math.prod(1 - 9 / (t + 8) for t in range(101, 201))).abs().max() < 1e-6
    assert 0 < average.weight.max() < 0.005

    steps = Spy(monkeypatch, "update_average", train_rm)
    folder = world("rm")
    run("rm", folder)
    saved = weights(folder, "rm")
    trunk = [name for name in saved["model"] if name.startswith("trunk.")]
    assert len(steps.calls) == 4 and any(not torch.equal(saved["model"][n], saved["weights"][n]) for n in trunk)
    calibration = {name: saved["weights"][name].item() for name in ("gain", "bias")}
    assert calibration == {"gain": 1, "bias": 0} and saved["model"]["gain"] != 1  # training goes on at the raw scale


@pytest.mark.parametrize("flags", [{}, {"critic": "shared"}, {"kl_in": "loss"}, *LADDER], ids=str)
def test_ppo_raises_a_simple_reward_clearly(flags, world, reward_e):
    folder = world("ppo")
    run("ppo", folder, max_iters=30, batch_size=48, reward=reward_e, **flags)
    scores = [row["score"] for row in metrics(folder, "ppo")]
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + 0.5


def test_a_finished_reward_model_is_calibrated_on_the_sft_policy(world):
    """Answers of that policy have scores of mean 0 and standard deviation 1. PPO's first scores are of such answers,
    but not those of the calibration: within 4 standard errors."""
    folder = world("ppo", "atlas")
    run("ppo", folder, max_iters=1, batch_size=1000, lr=0.0)
    saved = load_checkpoint(folder / "rm.pt", "rm")["model"]
    assert saved["gain"] != 1 and saved["bias"] != 0
    assert abs(metrics(folder, "ppo")[0]["score"]) < 4 * math.sqrt(1 / 1000 + 1 / 512)


# ----------------------------------------------------------------------------------------------------------
# the ratio, lr=0, the micro-batch

@pytest.mark.parametrize("flags", [
    {}, {"micro_batch_size": 1}, {"micro_batch_size": 2}, {"micro_batch_size": 3}, {"critic": "shared"},
    {"minibatches": 1, "epochs": 1}, {"temperature": 0.7},
    {"minibatches": 4, "critic": "shared", "micro_batch_size": 1}, {"world": "llama"},
    {"world": "llama", "critic": "shared", "micro_batch_size": 2}, *LADDER], ids=str)
def test_the_first_ratio_is_exactly_1_in_every_iteration(flags, world):
    flags = dict(flags)
    folder = world("ppo", flags.pop("world", "pairs"))
    run("ppo", folder, **flags)
    rows = metrics(folder, "ppo")
    assert [row["ratio_first"] for row in rows] == [0.0] * 3
    assert rows[-1]["kl"] != 0  # the policy has left the reference: the ratio is not taken against that
    # the sampler's cache rounds differently, and that is all
    assert all(row["logprob_gap_max"] < 1e-5 for row in rows)


@pytest.mark.parametrize("flags", [{}, {"critic": "shared", "micro_batch_size": 2}], ids=str)
def test_in_bfloat16_the_ratio_starts_at_1_and_sampling_only_rounds(flags, world, monkeypatch):
    """Ratios come from one kind of pass, over the same rows in the same order, where every product rounds in the same
    way. The sampler's products, of one token a row, may round in another. bfloat16 keeps a number to 2^-8 of itself: a
    logit of at most L moves by 2^-8 L, a log-prob, which is one logit less the log-sum of all, by twice that, and the
    difference of two passes by twice that again. Roundings cancel, so the mean is held to a fourth of it."""
    logits, folder = Spy(monkeypatch, "upcast", rollout), world("ppo")
    run("ppo", folder, dtype="bfloat16", **flags)
    largest = max(result.abs().max().item() for (_,), result in logits.calls)
    assert logits.calls[0][0][0].dtype == torch.bfloat16
    rows = metrics(folder, "ppo")
    assert [row["ratio_first"] for row in rows] == [0.0] * 3
    assert all(row["logprob_gap_max"] < 4 * 2 ** -8 * largest for row in rows)
    assert all(row["logprob_gap"] < 2 ** -8 * largest for row in rows)


@pytest.mark.parametrize("stage, flags", [
    ("sft", {}), ("sft", {"arch": "llama"}), ("ppo", {}),
    ("ppo", {"critic": "shared", "kl_in": "loss", "ent_coef": 0.1, "temperature": 0.7}),
    ("ppo", {"dtype": "bfloat16"})], ids=str)
def test_a_head_in_chunks_trains_alike_and_its_first_ratio_is_1(stage, flags, world, monkeypatch):
    """Where four rows' logits are too many for the budget, whatever --micro_batch_size says."""
    rows, chunks = [], Spy(monkeypatch, "chunked_head", rollout)
    for budget in (device.CPU_BUDGET, 2e4):
        monkeypatch.setattr(device, "CPU_BUDGET", budget)
        assert not chunks.calls
        folder = world(stage)
        run(stage, folder, micro_batch_size=6, **flags)
        rows.append(metrics(folder, stage))
    assert {args[3] for args, _ in chunks.calls} == {int(2e4 / 12 / 257)}
    assert [row.get("ratio_first", 0) for row in rows[1]] == [0.0] * len(rows[1])
    loose = 2e-2 if "dtype" in flags else 1e-4
    for name in {"loss", "kl", "policy_loss", "value_loss", "entropy", "grad_norm"} & rows[0][0].keys():
        assert rows[1][0][name] == pytest.approx(rows[0][0][name], rel=loose, abs=1e-5), name


def test_old_and_reference_logprobs_come_from_passes_of_update_shape(world, monkeypatch):
    """A matrix product may round differently for another number of rows, though not on every CPU and size."""
    score_response = Spy(monkeypatch, "score_response", experience)
    run("ppo", world("ppo"), micro_batch_size=2)
    assert {len(tokens) for (_, tokens, *_), _ in score_response.calls} == {2}


def test_ppo_samples_and_trains_without_the_dropout_of_sft(world):
    folder = world("sft")
    run("sft", folder, dropout=0.5), run("rm", folder)
    run("ppo", folder)
    assert [row["ratio_first"] for row in metrics(folder, "ppo")] == [0.0] * 3


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_lr_0_changes_nothing_at_all(critic, world):
    folder = world("ppo")
    run("ppo", folder, lr=0.0, critic=critic)
    assert digest(weights(folder, "ppo")["model"]) == digest(weights(folder, "sft")["model"])
    for row in metrics(folder, "ppo"):
        assert (row["kl"], row["clip_frac"], row["ratio_first"]) == (0, 0, 0)
        # In the second epoch a row stands elsewhere in its pass, where a matrix product may round differently
        assert abs(row["ratio_max"] - 1) < 1e-5 and abs(row["approx_kl"]) < 1e-9
        assert row["grad_norm"] > 0


@pytest.mark.parametrize("stage, splits", [("sft", [1, 3, 12]), ("rm", [1, 2, 6]), ("ppo", [1, 2, 6])])
def test_no_gradient_weight_or_metric_depends_on_the_micro_batch(stage, splits, world, monkeypatch):
    """A mean of the parts' means would weigh the tokens of short responses more, and comparisons with few pairs. The
    gradient agrees to 1e-6 of its norm, some ten float32 roundings. AdamW's first step is
    lr * sign(gradient), so the weights agree to 1e-5 except where the gradient is 0 in theory (the keys' biases) and
    its sign that of a rounding."""
    gradients, finals, rows, step = [], [], [], optimizer.Optimizer.step
    load = train_rm.load_comparisons

    def with_several_pairs(*args):
        split = load(*args)
        return replace(split, train=[replace(row, pairs=row.pairs * (1 + i % 3)) for i, row in enumerate(split.train)])
    monkeypatch.setattr(train_rm, "load_comparisons", with_several_pairs)

    def keep_gradient(self, iteration, loss):
        gradients.append(torch.cat([p.grad.reshape(-1) for p in self.params if p.grad is not None]))
        return step(self, iteration, loss)
    monkeypatch.setattr(optimizer.Optimizer, "step", keep_gradient)
    flags = {"ppo": dict(batch_size=6, minibatches=1, ent_coef=0.1, kl_in="loss", kl_coef=1.0)}.get(stage, {})
    for micro in splits:
        folder = world(stage)
        gradients.append(None)
        rows.append(run(stage, folder, micro_batch_size=micro, max_iters=1, **flags))
        finals.append(torch.cat([p.reshape(-1) for key, p in weights(folder, stage)["model"].items() if "." in key]))
    first = [gradients[i + 1] for i, gradient in enumerate(gradients) if gradient is None]
    for gradient, final, row in zip(first[1:], finals[1:], rows[1:]):
        assert (gradient - first[0]).norm() < 1e-6 * first[0].norm()
        assert ((final - finals[0]).abs() > 1e-5).float().mean() < 0.01
        for measured in {"loss", "accuracy", "policy_loss", "value_loss", "ratio_mean", "grad_norm"} & row.keys():
            assert row[measured] == pytest.approx(rows[0][measured], rel=1e-5, abs=1e-6), measured


@pytest.mark.parametrize("stage, flags", [("sft", {"dropout": 0.2}), ("rm", {}), ("ppo", {}),
                                          ("ppo", {"critic": "shared"}), ("ppo", {"dtype": "bfloat16"}),
                                          ("ppo", {"world": "llama"})], ids=str)
def test_recomputed_activations_change_no_bit_of_a_run(stage, flags, world, monkeypatch):
    """They are recomputed in every module that is trained."""
    again, finals, flags = Spy(monkeypatch, "checkpoint", model), [], dict(flags)
    kind = flags.pop("world", "pairs")
    for recompute in (False, True):
        folder = world(stage, kind)
        assert not again.calls
        run(stage, folder, recompute=recompute, **flags)
        finals.append((digest(weights(folder, stage)), metrics(folder, stage)))
    assert finals[0] == finals[1]
    modules = 2 if stage == "ppo" and "critic" not in flags else 1
    assert len({id(args[0]) for args, _ in again.calls}) == modules * SIZES["n_layer"]


# ----------------------------------------------------------------------------------------------------------
# inside one PPO iteration

def test_every_epoch_reuses_old_logprobs_advantages_and_returns(world, monkeypatch):
    """Fresh old log-probs each epoch would keep the ratio at 1 and the clip dead; whitening per minibatch
    would compare answers with their few neighbours; returns after whitening would have the wrong scale."""
    policy_loss, value_loss = Spy(monkeypatch, "policy_loss"), Spy(monkeypatch, "value_loss")
    gae, shape = Spy(monkeypatch, "gae"), Spy(monkeypatch, "shape_rewards")
    run("ppo", world("ppo"), max_iters=2, epochs=3, minibatches=3, clip=0.1, value_clip=0.3)
    # The second iteration, because the policy of the first is still the reference
    (_, logprobs, ref_logprobs, mask, _), _ = shape.calls[1]
    gae_args, (advantages, returns) = gae.calls[1]
    assert len(gae.calls) == 2 and not torch.equal(logprobs, ref_logprobs)
    assert torch.equal(returns, advantages + torch.where(mask, gae_args[1], 0))
    mean, std = advantages[mask].mean(), advantages[mask].std(unbiased=False)
    whitened = torch.where(mask, (advantages - mean) / std, 0)
    # rows of one length would not tell a token mean from a mean of means
    assert mask.sum(1).unique().numel() > 1

    places = []
    for epoch in range(3):
        calls = slice(9 + 3 * epoch, 9 + 3 * epoch + 3)
        order = []
        for (policy_args, _), (value_args, _) in zip(policy_loss.calls[calls], value_loss.calls[calls]):
            (_, old, adv, m, clip), (_, old_values, ret, _, value_clip) = policy_args, value_args
            assert (clip, value_clip) == (0.1, 0.3)
            rows = []  # which a minibatch holds; inside it they stand by length
            for i in range(len(old)):
                row, = [b for b in range(len(mask)) if torch.equal(old[i], logprobs[b])]
                rows.append(row)
                assert torch.equal(ret[i], returns[row]) and torch.equal(m[i], mask[row])
                assert torch.equal(old_values[i], gae_args[1][row])
                torch.testing.assert_close(adv[i] * m[i], whitened[row], rtol=1e-5, atol=1e-5)
            order += sorted(rows)
        assert sorted(order) == list(range(len(mask)))  # every response once per epoch
        places.append(order)
    assert places[0] == sorted(places[0]) and places[1] != places[0] and places[1] != places[2]


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_the_old_values_are_those_that_the_first_step_starts_from(critic, world, monkeypatch):
    """They come from the model that is trained as the critic, in the same passes. Those of the policy's own head, or of
    the reference's, would give other advantages and no error."""
    value_loss = Spy(monkeypatch, "value_loss")
    run("ppo", world("ppo"), max_iters=2, critic=critic)
    (values, old_values, _, mask, _), _ = value_loss.calls[4]  # the first of the second iteration
    assert torch.equal(values[mask], old_values[mask]) and values[mask].abs().min() > 0


@pytest.mark.parametrize("flags", [{"critic": "shared", "ent_coef": 0.3}, {"kl_in": "loss", "ent_coef": 0.3},
                                   {"kl_in": "loss", "kl_kind": "k3", "vf_coef": 0.7}, LADDER[-1]], ids=str)
def test_the_loss_is_the_sum_of_its_parts_each_with_its_coefficient(flags, world, monkeypatch):
    """kl_coef is the controller's: here it falls by a fifth after the first iteration, whose KL is 0. float32: three
    roundings of numbers of order 1."""
    monkeypatch.setattr(train_ppo, "KLController", partial(train_ppo.KLController, horizon=12))
    policy_loss, value_loss, masked_mean = (Spy(monkeypatch, name) for name in
                                            ("policy_loss", "value_loss", "masked_mean"))
    score, kl_estimate = Spy(monkeypatch, "score_response", experience), Spy(monkeypatch, "kl_estimate")
    shape, step = Spy(monkeypatch, "shape_rewards"), Spy(monkeypatch, "step", optimizer.Optimizer)
    run("ppo", world("ppo"), max_iters=2, epochs=1, kl_coef=20.0, kl_target=1.0, **flags)
    (_, old, ref, *_), _ = shape.calls[1]
    scored = [result for _, result in score.calls if result[0].requires_grad]
    means, kls, in_loss = iter(masked_mean.calls), iter(kl_estimate.calls), flags.get("kl_in") == "loss"
    assert [args[4] for args, _ in shape.calls] == [0.0 if in_loss else kl_coef for kl_coef in (20.0, 16.0)]
    assert len(step.calls) == 4 and not torch.equal(old, ref)
    for n, (((_, _, loss), _), (logprobs, _, entropy)) in enumerate(zip(step.calls, scored, strict=True)):
        expected = policy_loss.calls[n][1][0]
        if "advantage" not in flags:
            expected = expected + flags.get("vf_coef", 0.1) * value_loss.calls[n][1][0]
        if "ent_coef" in flags:
            (averaged, _), mean = next(means)
            assert averaged is entropy
            expected = expected - 0.3 * mean
        if in_loss:
            (new, reference, kind), kl = next(kls)
            (averaged, _), mean = next(means)
            assert averaged is kl and new is logprobs and kind == flags.get("kl_kind", "k2")
            assert n < 2 or all(any(torch.equal(row, other) for other in ref) for row in reference)
            expected = expected + (20.0 if n < 2 else 16.0) * mean
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-6)


def test_gae_gets_gamma_and_lambda_each_in_its_place(world, monkeypatch):
    """Swapped, they would discount the rewards by lambda, without an error."""
    gae = Spy(monkeypatch, "gae")
    run("ppo", world("ppo"), max_iters=1, gamma=0.9, lam=0.5)
    assert gae.calls[0][0][3:] == (0.9, 0.5)


def test_each_iteration_and_each_epoch_is_shuffled_differently(world, monkeypatch):
    randperm = Spy(monkeypatch, "randperm", torch)
    run("ppo", world("ppo"), max_iters=3, epochs=3)
    shuffles = [tuple(result.tolist()) for _, result in randperm.calls]
    assert len(set(shuffles)) == len(shuffles) >= 6


def test_each_iteration_samples_anew(world):
    """One prompt and a policy that stands still: only the random numbers can tell the iterations apart."""
    folder = world("ppo")
    write_jsonl(folder / "pairs.jsonl", pairs()[:1])
    run("ppo", folder, lr=0.0)
    assert len({row["score"] for row in metrics(folder, "ppo")}) == 3


def test_the_ratio_moves_between_epochs(world):
    folder = world("ppo")
    run("ppo", folder, epochs=2, minibatches=1)
    assert all(row["ratio_max"] > 1 + 1e-4 and row["approx_kl"] > 0 for row in metrics(folder, "ppo"))


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_reference_and_reward_model_are_frozen_and_unshared(critic, world, monkeypatch):
    policies, reward_models = (Spy(monkeypatch, name, stages) for name in ("load_policy", "load_reward_model"))
    optimizers = Spy(monkeypatch, "Optimizer")
    folder = world("ppo")
    run("ppo", folder, critic=critic)
    (_, policy), (_, reference) = policies.calls
    reward_model = reward_models.calls[0][1][0]
    trained = {p.data_ptr() for p in optimizers.calls[0][1].params}
    assert trained >= {p.data_ptr() for p in policy.parameters()}
    for frozen, saved in ((reference, weights(folder, "sft")["model"]),
                          (reward_model, weights(folder, "rm")["model"])):
        assert not any(p.requires_grad for p in frozen.parameters())
        assert not trained & {p.data_ptr() for p in frozen.parameters()}
        assert digest(frozen.state_dict()) == digest(saved)
    assert digest(policy.state_dict()) != digest(reference.state_dict())


def test_a_separate_critic_starts_from_the_reward_model_and_trains(world, monkeypatch):
    """The policy's own value head stays as it was."""
    reward_models, folder = Spy(monkeypatch, "load_reward_model", stages), world("ppo")
    run("ppo", folder, critic="separate", lr=0.0, max_iters=1)
    start = reward_models.calls[0][1][0].as_critic()
    assert digest(weights(folder, "ppo")["critic"]) == digest(start.state_dict())

    folder = world("ppo")
    run("ppo", folder, critic="separate")
    saved, sft, rm = weights(folder, "ppo"), weights(folder, "sft")["model"], weights(folder, "rm")["model"]
    trunk = {name for name in rm if name.startswith("trunk.")}
    # 12 steps of 3e-3, and AdamW's are hardly longer
    assert all((saved["critic"][name] - rm[name]).abs().max() < 0.1 for name in trunk)
    assert all(not torch.equal(saved["critic"][name], rm[name]) for name in trunk)
    assert torch.equal(saved["model"]["value_head.linear.weight"], sft["value_head.linear.weight"])


def test_without_a_reward_model_the_critic_starts_as_the_sft_model(world, reward_e):
    """With the mean reward as its value: the SFT model's value head was never trained."""
    folder = world("ppo")
    row = run("ppo", folder, critic="separate", reward=reward_e, lr=0.0, max_iters=1, eos_penalty=0.0)
    critic, sft = weights(folder, "ppo")["critic"], weights(folder, "sft")["model"]
    mean = critic.pop("value_head.linear.bias")
    assert sft.pop("value_head.linear.bias") == 0 and digest(critic) == digest(sft)
    assert not critic["value_head.linear.weight"].any() and 0.3 * row["score"] < mean < 3 * row["score"]


def test_a_score_is_the_reward_models_for_the_prompt_and_the_whole_answer(world, monkeypatch):
    """Each is scored by itself here, without padding. float32: the products of a batch may round differently."""
    reward_models, generate = Spy(monkeypatch, "load_reward_model", stages), Spy(monkeypatch, "generate", experience)
    shape, folder = Spy(monkeypatch, "shape_rewards"), world("ppo")
    run("ppo", folder, max_iters=1, eos_penalty=0.0)
    (reward_model, _), rows = reward_models.calls[0][1], [
        p + r + [256] * (r[-1] != 256) for p, r in generate.calls[0][1].ids()]  # a cut one is scored as if it had ended
    with torch.no_grad():
        scores = torch.cat([reward_model(torch.tensor([row]), torch.tensor([len(row)])) for row in rows])
    torch.testing.assert_close(shape.calls[0][0][0], scores, rtol=0, atol=1e-5)
    assert scores.std() > 0.1


def test_the_eos_penalty_lowers_the_reward_and_not_the_score(world, monkeypatch):
    """It is taken off the reward of each response that was cut, and of no other."""
    rows, shape, generate = {}, Spy(monkeypatch, "shape_rewards"), Spy(monkeypatch, "generate", experience)
    for penalty in (0.0, 2.5):
        folder = world("ppo")
        run("ppo", folder, max_iters=1, eos_penalty=penalty)
        rows[penalty], = metrics(folder, "ppo")
    (plain, *_), (lowered, *_) = (args for args, _ in shape.calls)
    cut = torch.tensor([response[-1] != 256 for _, response in generate.calls[0][1].ids()])
    assert 0 < cut.sum() < 12
    torch.testing.assert_close(plain - lowered, 2.5 * cut, rtol=0, atol=1e-6)
    assert 0 < rows[0]["eos_rate"] < 1 and rows[0]["score"] == rows[2.5]["score"]
    assert rows[2.5]["reward"] == pytest.approx(rows[0]["reward"] - 2.5 * (1 - rows[0]["eos_rate"]), abs=1e-6)


def test_reward_is_score_minus_kl_coef_times_kl_and_kl_is_per_response(world):
    folder = world("ppo")
    run("ppo", folder, kl_coef=0.3, eos_penalty=0.0)
    for row in metrics(folder, "ppo"):
        assert row["reward"] == pytest.approx(row["score"] - 0.3 * row["kl"], abs=1e-5)
    assert row["kl"] != 0


@pytest.mark.parametrize("kl_kind", [None, "k2", "k3"])
def test_with_kl_in_loss_the_reward_is_the_score(kl_kind, world, reward_e):
    """The KL in the loss still holds the policy near the reference."""
    kls = {}
    for kl_coef in (0.0, 20.0):
        folder = world("ppo")
        run("ppo", folder, max_iters=8, kl_in="loss", kl_kind=kl_kind, kl_coef=kl_coef, eos_penalty=0.0,
            reward=reward_e)
        rows = metrics(folder, "ppo")
        assert all(row["reward"] == pytest.approx(row["score"], abs=1e-6) for row in rows)
        kls[kl_coef] = rows[-1]["kl"]
    assert kls[20.0] < 0.5 * kls[0.0]


def test_target_kl_ends_the_epochs_early(world):
    steps = {}
    for target in (1e-9, 1e9, None):
        folder = world("ppo")
        run("ppo", folder, target_kl=target)
        steps[target] = [row["optimizer_steps"] for row in metrics(folder, "ppo")]
    assert steps == {1e-9: [1, 1, 1], 1e9: [4, 4, 4], None: [4, 4, 4]}


def test_target_kl_is_compared_with_the_kl_of_a_minibatch(world):
    """Not with a multiple of it, as some implementations do, and not with the sum over its passes."""
    folder, flags = world("ppo"), {"max_iters": 1, "epochs": 1, "micro_batch_size": 2}
    reached = 2 * run("ppo", folder, **flags)["approx_kl"]  # a mean of two minibatches, of which the first has none
    for target, steps in ((0.99 * reached, 1), (1.01 * reached, 2)):
        assert run("ppo", world("ppo"), target_kl=target, **flags)["optimizer_steps"] == steps


def test_metrics_of_an_update_that_ended_early_count_what_was_done(world, monkeypatch):
    """Two minibatches were computed, the second of which ended the epochs, and one step was taken. A maximum is over
    both. float32: one rounding of the sum."""
    policy_loss, step = Spy(monkeypatch, "policy_loss"), Spy(monkeypatch, "step", optimizer.Optimizer)
    row = run("ppo", world("ppo"), max_iters=1, target_kl=1e-9)
    stats = [{"policy_loss": loss} | more for _, (loss, more) in policy_loss.calls]
    assert len(stats) == 2 and len(step.calls) == row["optimizer_steps"] == 1
    assert row["grad_norm"] == step.calls[0][1][1]
    for name in ("policy_loss", "approx_kl", "ratio_mean", "clip_frac"):
        assert row[name] == pytest.approx(sum(part[name].item() for part in stats) / 2, rel=1e-6, abs=1e-7), name
    assert row["ratio_max"] == max(part["ratio_max"].item() for part in stats) > 1


def test_the_entropy_bonus_raises_the_entropy(world, tmp_path):
    """Where all scores are equal and the KL is free, nothing else moves the policy."""
    flags = {"reward": reward_file(tmp_path, "[0.0] * len(prompts)"), "kl_coef": 0.0, "eos_penalty": 0.0}
    folder = world("ppo")
    run("ppo", folder, max_iters=5, ent_coef=1.0, **flags)
    entropies = [row["entropy"] for row in metrics(folder, "ppo")]
    assert entropies[-1] > entropies[0] + 0.1


def test_a_constant_in_the_reward_changes_nothing(world, tmp_path):
    """A new critic starts at the mean reward. From 0, its first errors would teach short answers where the constant is
    above 0, and long ones below. Adam's first steps are lr * sign(gradient), so the weights agree where it is not 0."""
    rows, finals = {}, {}
    for constant in (0.0, -10.0, 10.0):
        for critic in ("separate", "shared"):
            folder = world("ppo")
            reward = reward_file(tmp_path, f"[r.count('e') + {constant} for r in responses]")
            run("ppo", folder, reward=reward, critic=critic, max_iters=1, epochs=1, minibatches=1)
            rows[constant, critic], = metrics(folder, "ppo")
            model = weights(folder, "ppo")["model"]
            finals[constant, critic] = torch.cat([p.reshape(-1) for name, p in model.items() if "value" not in name])
    for (constant, critic), row in rows.items():
        assert row["score"] - constant == pytest.approx(rows[0.0, critic]["score"], abs=1e-5)
        assert row["value_loss"] == pytest.approx(rows[0.0, critic]["value_loss"], rel=1e-3)
        moved = (finals[constant, critic] - finals[0.0, critic]).abs() > 1e-4
        assert moved.float().mean() < 0.02


def test_groups_whose_scores_agree_teach_nothing(world, tmp_path, monkeypatch):
    """A question may pay more than another: --advantage=group compares the answers to one question only."""
    (tmp_path / "reward.py").write_text(
        "calls = []\ndef f(prompts, responses):\n    calls.append(1)\n"
        "    return [sum(map(ord, p + r * (len(calls) == 1))) % 9.0 for p, r in zip(prompts, responses)]\n")
    loss, folder = Spy(monkeypatch, "policy_loss"), world("ppo")
    run("ppo", folder, reward=f"{tmp_path / 'reward.py'}:f", eos_penalty=0.0, max_iters=2, epochs=1, minibatches=1,
        advantage="group", samples_per_prompt=4)
    assert metrics(folder, "ppo")[1]["score_std"] > 0
    first, second = (args[2] for args, _ in loss.calls)
    assert first.any() and not second.any()


def test_where_no_score_differs_the_policy_learns_nothing(world, tmp_path, monkeypatch):
    """Whitened, the KL and the critic's errors would move it as far as a reward does."""
    (tmp_path / "reward.py").write_text("calls = []\ndef f(prompts, responses):\n    calls.append(1)\n"
                                        "    return [5.0 + (len(calls) == 1) * len(r) for r in responses]\n")
    loss, gae, folder = Spy(monkeypatch, "policy_loss"), Spy(monkeypatch, "gae"), world("ppo")
    run("ppo", folder, reward=f"{tmp_path / 'reward.py'}:f", eos_penalty=0.0, max_iters=2, epochs=1, minibatches=1)
    first, second = (args[2] for args, _ in loss.calls)
    assert first.any() and not second.any() and gae.calls[1][1][0].any()
    assert metrics(folder, "ppo")[1]["score_std"] == 0.0


@pytest.mark.parametrize("reward", ["[r.count('e') for r in responses]", "[5.0] * len(responses)"])
def test_the_rung_clip_is_ppo_to_the_last_bit(reward, world, tmp_path):
    """With equal scores, too. A checkpoint of the one may be resumed as the other."""
    plain, rung, reward = world("ppo"), world("ppo"), reward_file(tmp_path, reward)
    run("ppo", plain, reward=reward, ent_coef=0.01), run("ppo", rung, reward=reward, ent_coef=0.01, objective="clip")
    assert digest(weights(plain, "ppo")) == digest(weights(rung, "ppo"))
    assert metrics(plain, "ppo") == metrics(rung, "ppo")


def test_a_cut_answer_is_scored_as_if_it_had_ended(world, monkeypatch):
    """A reward model has never judged a text without EOS. The missing EOS costs eos_penalty, and nothing else."""
    forward, scored = RewardModel.forward, []

    def look(self, tokens, lens):
        scored.append((tokens, lens))
        return forward(self, tokens, lens)
    monkeypatch.setattr(RewardModel, "forward", look)
    folder = world("ppo")
    row = run("ppo", folder, max_iters=1, max_new_tokens=4)
    assert row["eos_rate"] < 0.9
    for tokens, lens in scored:
        assert (tokens.gather(1, (lens - 1).unsqueeze(1)) == 256).all()


def test_sft_weighs_every_token_of_the_data_alike(world, monkeypatch):
    """Over whole epochs the gradients average to that of the mean over all tokens, though batches are sorted by length.
    A mean over each batch would give tokens of short responses several times the weight of those of long ones."""
    steps, step, folder = [], optimizer.Optimizer.step, world("sft")

    def look(self, iteration, loss):
        steps.append(torch.cat([p.grad.reshape(-1) for p in self.params if p.grad is not None]))
        return step(self, iteration, loss)
    monkeypatch.setattr(optimizer.Optimizer, "step", look)
    write_jsonl(folder / "pairs.jsonl", [row | {"chosen": row["chosen"] + " x" * i} for i, row in enumerate(pairs())])
    run("sft", folder, batch_size=19, max_iters=50, lr=0.0, block_size=128)  # 25 epochs, in one window of lengths

    policy = stages.load_policy(load_checkpoint(folder / "sft.pt", "sft"))
    rows = train_sft.load_data(settings("sft", folder), get_tokenizer("bytes"), 128).train
    tokens, prompt_lens, _, mask = collate_demonstrations(rows, 256)
    (-masked_mean(score_response(policy, tokens, prompt_lens, mask.size(1))[0], mask)).backward()
    exact = torch.cat([p.grad.reshape(-1) for p in policy.parameters() if p.grad is not None])
    assert (torch.stack(steps).mean(0) - exact).norm() < 1e-5 * exact.norm()


def test_the_critics_gradient_does_not_shorten_the_policys(world, tmp_path):
    """Each is clipped by itself: with a reward in hundreds the value loss has a gradient in hundreds."""
    norms = {}
    for scale in (1.0, 100.0):
        reward = reward_file(tmp_path, f"[{scale} * r.count('e') for r in responses]")
        norms[scale] = run("ppo", world("ppo"), reward=reward, kl_coef=0.0, eos_penalty=0.0, max_iters=1, epochs=1,
                           minibatches=1)["grad_norm"]
    assert norms[100.0] == pytest.approx(norms[1.0], rel=1e-3)


def test_explained_variance_is_of_the_reward_to_go_by_the_old_values(world, monkeypatch):
    """1 - Var(G - V) / Var(G), with G the rewards that followed. Not over Var(V); and not of the lambda-returns, which
    contain V: a critic that knows nothing would explain them."""
    gae = Spy(monkeypatch, "gae")
    row = run("ppo", world("ppo"), max_iters=1, lam=0.5)
    (rewards, values, mask, gamma, _), (_, lambda_returns) = gae.calls[0]

    def explained(returns, over):
        return (1 - (returns - values)[mask].var(unbiased=False) / over[mask].var(unbiased=False)).item()
    to_go = reward_to_go(rewards, mask, gamma)
    assert row["explained_variance"] == pytest.approx(explained(to_go, to_go), abs=1e-4)
    for other in (explained(to_go, values), explained(lambda_returns, lambda_returns)):
        assert abs(row["explained_variance"] - other) > 0.01


def test_target_kl_below_rounding_still_takes_a_step(world, monkeypatch):
    """In bfloat16 the first ratio is not exactly 1; a minibatch before any step means nothing yet."""
    policy_loss = train_ppo.policy_loss

    def rounded(*args):
        loss, stats = policy_loss(*args)
        return loss, stats | {"approx_kl": stats["approx_kl"] + 1e-6}
    monkeypatch.setattr(train_ppo, "policy_loss", rounded)
    folder = world("ppo")
    run("ppo", folder, target_kl=1e-9)
    assert all(row["optimizer_steps"] == 1 and row["grad_norm"] > 0 for row in metrics(folder, "ppo"))


@pytest.mark.parametrize("objective", ["reinforce", "reward_to_go", "baseline", "gae"])
def test_an_objective_without_a_ratio_takes_one_step_per_rollout(objective, world, monkeypatch):
    """The step is over the whole rollout."""
    surrogate_loss, folder = Spy(monkeypatch, "surrogate_loss", rungs), world("ppo")
    run("ppo", folder, objective=objective, **ONE_STEP)
    assert [row["optimizer_steps"] for row in metrics(folder, "ppo")] == [1] * 3
    assert [len(args[1]) for args, _ in surrogate_loss.calls] == [12] * 3


def test_advantages_are_whitened_on_rungs_with_a_baseline_only(world, monkeypatch):
    """Whitening takes the mean off: reinforce and reward_to_go would get a baseline that the formula does not have."""
    for flags in LADDER:
        with monkeypatch.context() as patch:
            loss = Spy(patch, "surrogate_loss", rungs) if "objective" in flags else Spy(patch, "policy_loss")
            run("ppo", world("ppo"), max_iters=1, **{"minibatches": 1, "epochs": 1} | flags)
            advantages, mask = loss.calls[0][0][3 if "objective" in flags else 2:][:2]
        mean, spread = advantages[mask].mean(), advantages[mask].std(unbiased=False)
        whitened = abs(mean) < 1e-6 and abs(spread - 1) < 1e-3
        assert whitened == (flags.get("objective") not in ("reinforce", "reward_to_go")), flags


def test_a_group_answers_one_prompt_and_its_advantages_need_no_critic(world, monkeypatch):
    shape, group, folder = Spy(monkeypatch, "shape_rewards"), Spy(monkeypatch, "group_advantages"), world("ppo")
    generate = Spy(monkeypatch, "generate", experience)
    run("ppo", folder, advantage="group", samples_per_prompt=4, max_iters=2, gamma=0.5)
    rows = metrics(folder, "ppo")
    rollouts = [args for args, _ in generate.calls if len(args[1]) == 12]  # not the looks at the held-out prompts
    prompts = [row[:n] for _, tokens, lens, *_ in rollouts
               for row, n in zip(tokens.tolist(), lens.tolist())]
    assert all(prompts[i] == prompts[i - i % 4] for i in range(24)) and len(set(map(tuple, prompts))) > 4
    ((_, _, _, mask, _), rewards), (_, advantages) = shape.calls[0], group.calls[0]
    sums = (rewards * 0.5 ** torch.arange(rewards.size(1))).sum(1).view(-1, 4)
    expected = (sums - (sums.sum(1, keepdim=True) - sums) / 3).view(-1, 1) * mask
    torch.testing.assert_close(advantages, expected, rtol=0, atol=1e-6)
    before, after = (torch.load(folder / f"{name}.pt", weights_only=True)["model"] for name in ("sft", "ppo"))
    assert all(torch.equal(before[key], after[key]) for key in before if key.startswith("value_head"))
    assert len(rows) == 2


def test_the_penalty_doubles_when_the_update_went_too_far(world):
    """The metric shows the penalty that was used."""
    folder = world("ppo")
    run("ppo", folder, objective="kl_penalty", penalty_target=1e-9, lr=1e-2)
    assert [row["penalty"] for row in metrics(folder, "ppo")] == [1.0, 2.0, 4.0]


def test_kl_target_moves_kl_coef_and_metrics_show_the_one_that_was_used(world, monkeypatch):
    """The rewards are shaped with it, the KL it goes by is per response, and an episode is a response."""
    folder, shape = world("ppo"), Spy(monkeypatch, "shape_rewards")
    run("ppo", folder, kl_target=1e-6, max_iters=4, lr=0.03)
    used = [row["kl_coef"] for row in metrics(folder, "ppo")]
    assert used == [args[4] for args, _ in shape.calls]
    # The first KL is 0, below any target: 20 % less per 10,000 episodes, of which a rollout has 12.
    assert used[0] == train_ppo.Config.kl_coef and used[1] == pytest.approx(used[0] * (1 - 0.2 * 12 / 1e4), rel=1e-12)
    assert used[3] != used[2]

    folder, flags = world("ppo"), {"max_iters": 3, "lr": 0.03, "samples_per_prompt": 2}
    run("ppo", folder, kl_target=1.0, **flags)
    target = 1.1 * metrics(folder, "ppo")[1]["kl"]  # the second KL is then 1 / 1.1 of it, inside the clip of 20 %
    folder = world("ppo")
    run("ppo", folder, kl_target=target, **flags)
    used = [row["kl_coef"] for row in metrics(folder, "ppo")]
    assert used[2] == pytest.approx(used[1] * (1 + (1 / 1.1 - 1) * 12 / 1e4), rel=1e-12)


def test_bad_gradients_end_the_run_before_they_reach_the_weights(world, monkeypatch):
    policy_loss = train_ppo.policy_loss

    def poisoned(*args):
        loss, stats = policy_loss(*args)
        return loss * math.nan, stats
    monkeypatch.setattr(train_ppo, "policy_loss", poisoned)
    folder = world("ppo")
    with pytest.raises(FloatingPointError, match="2 optimizer steps in a row"):
        run("ppo", folder, max_bad_steps=2)
    assert not (folder / "ppo.pt").exists()


def test_skipped_steps_are_counted_over_the_whole_run(world, monkeypatch):
    """A good step ends a row of bad ones, but the metric must not forget them."""
    policy_loss, losses = train_ppo.policy_loss, iter([math.nan])
    monkeypatch.setattr(train_ppo, "policy_loss", lambda *args: (policy_loss(*args)[0] * next(losses, 1.0),
                                                                 policy_loss(*args)[1]))
    folder = world("ppo")
    run("ppo", folder)
    assert [row["skipped_steps"] for row in metrics(folder, "ppo")] == [1, 1, 1]


@pytest.mark.parametrize("stage", STAGES)
def test_the_learning_rate_decays_by_iterations_not_by_optimizer_steps(stage, world):
    """PPO takes four steps in each of these iterations."""
    folder = world(stage)
    run(stage, folder, max_iters=3, lr=0.004, lr_decay_iters=4)
    assert [row["lr"] for row in metrics(folder, stage)] == pytest.approx([0.004, 0.003, 0.002], rel=1e-15)


# ----------------------------------------------------------------------------------------------------------
# metrics

def test_every_iteration_has_a_line_with_every_metric(world):
    folder = world("ppo", "atlas")
    run("ppo", folder, max_iters=5, log_interval=100)
    header = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    assert header["stage"] == "ppo" and "iter" not in header and header["flags"]["max_iters"] == 5
    rows = metrics(folder, "ppo")
    names = ("stage iter episodes score kl reward entropy policy_loss value_loss approx_kl clip_frac "
             "ratio_mean ratio_max explained_variance response_len eos_rate kl_coef lr grad_norm ratio_first "
             "logprob_gap skipped_steps gold").split()
    full = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()[1:]]
    for i, (row, timed) in enumerate(zip(rows, full, strict=True), 1):
        assert row["iter"] == i and row["episodes"] == 12 * i
        for name in [*names, *CLOCKS]:
            assert timed[name] is not None, name
        assert ("gold_heldout" in row) == (i in (1, 5))
        assert 0 <= row["gold"] <= 1 and 0 < row["response_len"] <= 8 and 0 <= row["entropy"] <= math.log(510)


def test_rollout_metrics_by_hand():
    """Each number reads its own tensors, and no padding, which is NaN here."""
    nan, mask = math.nan, torch.tensor([[True, True, False], [True, False, False]])
    sampled, old, ref, values, entropy = (torch.tensor([[a, b, nan], [c, nan, nan]]) for a, b, c in (
        (-1.0, -2.0, -3.0), (-1.25, -2.0, -2.5), (-2.0, -2.0, -3.0), (1.0, 2.0, 3.0), (1.0, 2.0, 6.0)))
    row = rollout_metrics(SimpleNamespace(mask=mask, logprobs=sampled), torch.tensor([True, False]),
                          torch.tensor([4.0, 8.0]), torch.tensor([[-1.0, 6.0, 0.0], [4.0, 0.0, 0.0]]), old, ref, values,
                          entropy, gamma=0.5)
    # reward-to-go 2, 6, 4, so that the critic's errors are 1, 4, 1 with a variance of 2; that of the returns is 8 / 3
    expected = {"score": 6, "score_std": 2, "kl": (0.75 + 0.5) / 2, "reward": 4.5, "entropy": 3,
                "explained_variance": 1 - 2 / (8 / 3), "response_len": 1.5, "eos_rate": 0.5, "logprob_gap": 0.25,
                "logprob_gap_max": 0.5}
    assert {name: float(value) for name, value in row.items()} == pytest.approx(expected, rel=1e-6)


def test_tokens_per_s_are_response_tokens_over_all_seconds_of_an_iteration(world):
    """Padding does not count. Some response here has all 8 tokens, and the mean is less."""
    row = run("ppo", world("ppo"), max_iters=1)
    seconds = row["sec_rollout"] + row["sec_score"] + row["sec_update"]
    assert row["tokens_per_s"] * seconds == pytest.approx(12 * row["response_len"], rel=1e-6)
    assert row["response_len"] < 8 and row["eos_rate"] < 1


def test_gold_heldout_is_of_the_policys_answers_to_the_heldout_questions(world, monkeypatch):
    """Each question once, even where processes need a few more rows to get as many."""
    monkeypatch.setattr(distributed, "fill_up", lambda rows: rows + rows[:1])
    evaluate, generate = Spy(monkeypatch, "evaluate", atlas), Spy(monkeypatch, "generate", experience)
    policies = Spy(monkeypatch, "load_policy", stages)
    row = run("ppo", world("ppo", "atlas"), max_iters=1)
    (_, measured), ((answers,), heldout) = evaluate.calls
    assert [question for question, _ in answers] == atlas.prompts("heldout")
    assert row["gold_heldout"] == heldout["gold"]
    assert (row["gold"], row["utility"]) == (measured["gold"], measured["utility"])
    assert generate.calls[1][0][0] is policies.calls[0][1]


def test_the_table_shows_the_kl_of_each_answer_before_and_after(world, monkeypatch):
    """In nats of the whole response: 0 before, where the policy is the reference. The sampler may differ by 1e-5 a
    token (see logprob_gap_max above), and an answer has at most 8."""
    monkeypatch.setattr(distributed, "fill_up", lambda rows: rows + rows[:1])
    table, generate = Spy(monkeypatch, "print_before_after"), Spy(monkeypatch, "generate", experience)
    folder = world("ppo")
    run("ppo", folder)
    ((before, after), _), sampled = table.calls[0], generate.calls[-1][1]
    reference = stages.load_policy(load_checkpoint(folder / "sft.pt", "sft"))
    with torch.no_grad():
        logprobs, *_ = rollout.score_response(reference, sampled.tokens, sampled.prompt_lens, sampled.mask.size(1))
    kls = ((sampled.logprobs - logprobs) * sampled.mask).sum(1).tolist()
    assert [row["kl"] for row in before] == [0.0, 0.0] and sampled.mask.sum(1).min() < sampled.mask.size(1)
    assert [row["kl"] for row in after] == pytest.approx(kls[:2], abs=8e-5) and max(map(abs, kls[:2])) > 0.01


@pytest.mark.parametrize("stage, names", [
    ("sft", "loss heldout_loss lr grad_norm skipped_steps"),
    ("rm", "loss accuracy heldout_loss heldout_accuracy lr grad_norm skipped_steps")])
def test_train_returns_its_last_line(stage, names, world):
    folder = world(stage)
    final = run(stage, folder)
    last = metrics(folder, stage)[-1]
    assert {name: final[name] for name in last} == last
    assert last.keys() >= set(names.split()) and last["iter"] == 4


# ----------------------------------------------------------------------------------------------------------
# resume

RESUMED = {"sft": dict(dropout=0.2, lr_decay_iters=20),  # dropout draws from torch's global generator
           "rm": {},
           "sft, llama": dict(init_from="llama"), "rm, llama": {}, "ppo, llama": dict(sample_interval=1),
           "ppo": dict(kl_target=0.01, epochs=2, minibatches=3, sample_interval=1),
           "ppo, kl_penalty": dict(objective="kl_penalty", penalty_target=1e-9, lr=1e-2, sample_interval=1)}


@pytest.mark.parametrize("case", RESUMED)
def test_three_iterations_and_three_resumed_equal_six_to_the_last_bit(case, world):
    """A second run of six equals the first, too. Weights, AdamW's moments, the KL coefficient, generators, and every
    logged number but the clocks."""
    stage, kind = case.split(",")[0], "llama" if "llama" in case else "pairs"
    whole, again, parts = (world(stage, kind) for _ in range(3))
    flags = RESUMED[case] | {"log_interval": 1}
    if "init_from" in flags:
        flags["init_from"] = str(whole / "llama")
    run(stage, whole, max_iters=6, **flags), run(stage, again, max_iters=6, **flags)
    run(stage, parts, max_iters=3, **flags)
    torch.rand(5)  # a new process would not have this generator's state
    run(stage, parts, max_iters=6, resume=True, **flags)
    state = digest(weights(whole, stage, "optimizer", "kl_coef", "rng"))
    assert state == digest(weights(again, stage, "optimizer", "kl_coef", "rng"))
    assert state == digest(weights(parts, stage, "optimizer", "kl_coef", "rng"))
    assert metrics(whole, stage) == metrics(again, stage) == metrics(parts, stage)


def test_resume_refuses_another_flag_and_another_sft_model(world):
    folder = world("ppo")
    run("ppo", folder)
    with pytest.raises(UserError, match="--clip was 0.2 and is 0.1"):
        run("ppo", folder, max_iters=6, resume=True, clip=0.1)
    run("sft", folder, overwrite=True, seed=5)
    with pytest.raises(UserError, match="this run began with another sft: put it back"):
        run("ppo", folder, max_iters=6, resume=True)


@pytest.mark.parametrize("stage", STAGES)
def test_the_seed_decides_more_than_the_order_of_the_rows(stage, world):
    """With one row there is one order: the first weights of a model and the samples follow from the seed as well."""
    numbers = []
    for seed in (0, 1):
        folder = world(stage)
        write_jsonl(folder / "pairs.jsonl", pairs()[:1])
        numbers.append(run(stage, folder, seed=seed, max_iters=1, lr=0.0)["score" if stage == "ppo" else "loss"])
    assert numbers[0] != numbers[1]


@pytest.mark.parametrize("stage", STAGES)
def test_another_seed_is_another_run(stage, world):
    first, second = world(stage), world(stage)
    run(stage, first), run(stage, second, seed=1)
    assert metrics(first, stage) != metrics(second, stage)
