"""Tests of tools/bench.py: the counts against independent counts, the floor against arithmetic by hand, what it prints;
and of the arithmetic of experiments/scaling.py."""

import contextlib
import json
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import data
import tokenizer
import train_ppo
from experiments import scaling
from model import GPT, KVCache
from rollout import generate, score_response
from support import stages
from support.checkpoint import load_checkpoint
from support.device import hold_frozen
from support.flags import UserError
from tools import bench

SIZE = bench.Size(n_layer=2, n_head=2, n_embd=32, vocab_size=300, batch_size=8, prompt_len=5, response_len=6, epochs=2,
                  minibatches=2)
LLAMA = replace(SIZE, n_head=4, n_embd=64, kind=bench.PRESETS["qwen-0.6b"].kind | dict(n_kv_head=2, head_dim=12,
                                                                                       mlp_dim=96))
FLAGS = {name: getattr(SIZE, name) for name in ("n_layer", "n_head", "n_embd", "vocab_size", "batch_size", "prompt_len",
                                                "response_len", "epochs", "minibatches")}


def counted(function):
    """FLOPs of matrix products by torch's own counter. The plain attention kernel, as it does not know the CPU's."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("size", [SIZE, LLAMA], ids=["gpt2", "llama"])
def test_forward_flops_are_those_that_torch_counts(size):
    tokens, lens = torch.zeros(8, 11, dtype=torch.long), torch.full((8,), 5)
    model = GPT(size.model)
    with torch.no_grad():
        measured = counted(lambda: score_response(model, tokens, lens, 6))
    value_head = 2 * 8 * 6 * size.n_embd
    # This kernel multiplies the masked half of attention as well, which `pairs` leaves out elsewhere.
    assert measured == bench.forward_flops(size, 8 * 11, 8 * 11 * 11, 8 * 6) + value_head


@pytest.mark.parametrize("size", [SIZE, LLAMA], ids=["gpt2", "llama"])
def test_a_rollout_costs_what_work_says(size):
    model = GPT(size.model)
    prompts = torch.zeros(8, 5, dtype=torch.long)
    measured = counted(lambda: generate(model, prompts, torch.full((8,), 5), 6, eos=-1))
    pieces = bench.work(size, "shared", 4)["rollout"][:-1]  # the last one is the reward model
    assert len(pieces) == 6 and sum(piece.flops for piece in pieces) == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("size, critic", [(SIZE, "shared"), (SIZE, "separate"), (LLAMA, "none"), (LLAMA, "separate")],
                         ids=str)
def test_a_whole_iteration_of_the_loop_costs_what_work_says(size, critic, tmp_path):
    bench.write_inputs(tmp_path, size)
    totals = []

    def after(row):
        totals.append(counter.get_total_flops())
        if len(totals) == 2:
            raise bench.Enough

    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        bench.run_iterations(bench.train_config(tmp_path, size, device="cpu", dtype="float32", critic=critic), after)
    expected = sum(piece.flops for pieces in bench.work(size, critic, 4).values() for piece in pieces)
    # The counter sees both halves of attention.
    assert totals[1] - totals[0] == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("name, millions", [("gpt2", 124.4), ("smollm2", 134.5), ("qwen-0.6b", 596.0),
                                            ("llama-1b", 1235.8)])
def test_n_params_are_those_that_the_models_are_known_by(name, millions):
    positions = 0 if bench.PRESETS[name].kind else 1024 - 97  # GPT-2's own table of positions is longer
    assert bench.n_params(bench.PRESETS[name]) / 1e6 + positions * 768 / 1e6 == pytest.approx(millions, abs=0.1)


def test_a_kv_cache_holds_the_heads_of_keys_and_values():
    cache = KVCache(LLAMA.model, 8, 11, "cpu", torch.float32)
    held = sum(x.numel() * 4 for x in (*cache.k, *cache.v))
    decode = bench.work(LLAMA, "none", 4)["rollout"][1:-1]
    assert decode[1].bytes - decode[0].bytes == held / 11
    assert bench.estimate(LLAMA, "shared", 2, False)["KV cache"] == held


def test_the_floor_of_a_piece_is_the_larger_of_arithmetic_and_traffic():
    pieces = [bench.Piece(100.0), bench.Piece(10.0, 60.0, 5.0), bench.Piece(50.0, 60.0, 7.0)]
    # At 10 FLOP/s, and 20 bytes/s in a set of 5 bytes and 30 in one of 7: 10 + max(1, 3) + max(5, 2).
    assert bench.floor_seconds(pieces, 10.0, {5.0: 20.0, 7.0: 30.0}.get) == 18.0


def test_the_bytes_of_an_iteration_are_weights_cache_and_optimizer():
    size = bench.Size(n_layer=1, n_head=1, n_embd=2, vocab_size=300, batch_size=3, prompt_len=4, response_len=2,
                      epochs=1, minibatches=2)
    work = bench.work(size, "shared", width=4)
    weights = 4 * (12 * 2 * 2 + 300 * 2)
    kv = 4 * 2 * 2 * 3  # keys and values, 2 wide, of 3 rows: per position
    prefill, decode, reward_model = work["rollout"]
    assert (prefill.bytes, decode.bytes, decode.working_set) == (weights, weights + 5 * kv, weights + 6 * kv)
    assert decode.flops == 24 * 4 * 3 + 4 * 2 * 3 * 5 + 2 * 2 * 300 * 3
    update, *steps = work["update"]
    assert [step.bytes for step in steps] == [28 * bench.n_params(size)] * 2
    assert update.flops == 1.5 * work["score"][0].flops
    assert bench.work(size, "separate", 4)["update"][1].bytes == 2 * steps[0].bytes


@pytest.mark.parametrize("size", [SIZE, LLAMA], ids=["gpt2", "llama"])
def test_inputs_have_prompts_of_one_length_and_no_early_end(size, tmp_path):
    """The policy gives EOS a logit so low that every response has its full length."""
    bench.write_inputs(tmp_path, size)
    sft = load_checkpoint(tmp_path / "sft.pt", "sft")
    encoding, _ = tokenizer.run_tokenizer(None, None, sft["tokenizer"])
    split = data.load_prompts(str(tmp_path / "prompts.jsonl"), encoding, 12, 6)
    assert encoding.n_vocab == 300 and {len(prompt) for prompt in split.train} == {5}
    assert len(split.train) >= SIZE.batch_size
    policy = stages.load_policy(sft, "cpu")
    with torch.no_grad():
        logits = policy.policy_head(policy(torch.randint(299, (64, 11))))  # of any text before EOS
    logits = logits - logits[..., :-1].mean(-1, keepdim=True)  # the softmax does not see a common shift
    assert logits[..., encoding.eot_token].max() < -25 and logits[..., :-1].abs().max() < 5


@pytest.fixture(scope="module")
def quick():
    """Ceilings measured in no time: what they come to is not looked at."""
    with pytest.MonkeyPatch.context() as patch:
        fastest = bench.fastest
        patch.setattr(bench, "fastest", lambda function, device, seconds=0.0: fastest(function, device, 0.0))
        yield


def test_json_is_one_line_with_the_promised_keys_and_types(quick, capsys):
    bench.main(bench.Config(device="cpu", iters=2, warmup=0, json=True, **FLAGS))
    line, = capsys.readouterr().out.splitlines()
    row = json.loads(line)
    assert {name: type(value) for name, value in row.items()} == {
        "preset": str, "device": str, "dtype": str, "sec_rollout": float, "sec_score": float, "sec_update": float,
        "sec_iter": float, "floor_sec": float, "tokens_per_s": float, "mfu": float, "update_mfu": float,
        "decoding": float, "peak_memory_gb": float}
    assert row["dtype"] == "float32" and "1 threads" in row["device"]
    assert 0 < row["mfu"] < 1 and 0 < row["floor_sec"] < row["sec_iter"]
    assert row["sec_rollout"] + row["sec_score"] + row["sec_update"] <= row["sec_iter"] * 1.2
    assert row["tokens_per_s"] == pytest.approx(8 * 6 / row["sec_iter"], rel=0.01)


def test_the_table_shows_medians_of_the_iterations_after_the_warmup(monkeypatch, capsys):
    rows = [{"sec_rollout": s, "sec_score": 2 * s, "sec_update": 3 * s, "seconds": 6 * s, "response_len": 6.0}
            for s in (100.0, 3.0, 1.0, 2.0)]

    def run_iterations(config, after):
        with contextlib.suppress(bench.Enough):
            for row in rows:
                after(row)
            pytest.fail("went on beyond warm-up and iterations")

    monkeypatch.setattr(bench, "run_iterations", run_iterations)
    monkeypatch.setattr(bench, "matrix_rate", lambda *args: (1e9, "highest"))
    monkeypatch.setattr(bench, "bandwidth", lambda *args: 1e9)
    result = bench.bench(bench.Config(device="cpu", iters=3, warmup=1, **FLAGS))
    assert result["seconds"] == {"rollout": 2.0, "score": 4.0, "update": 6.0, "iter": 12.0} and result["tokens"] == 48
    flops = sum(piece.flops for pieces in bench.work(SIZE, "shared", 4).values() for piece in pieces)
    assert result["mfu"] == pytest.approx(flops / 12.0 / 1e9)
    bench.print_table(bench.Config(iters=3, warmup=1, **FLAGS), result)
    screen = capsys.readouterr().out
    assert "iter         12.000    6.000   18.000         4" in screen and "mean response 6.0" in screen


def test_time_spent_between_iterations_is_in_no_iteration(tmp_path):
    bench.write_inputs(tmp_path, SIZE)
    rows = []

    def after(row):
        rows.append(row)
        if len(rows) == 3:
            raise bench.Enough
        time.sleep(1.0)

    metrics = train_ppo.Metrics
    bench.run_iterations(bench.train_config(tmp_path, SIZE, device="cpu", critic="shared"), after)
    assert max(row["seconds"] for row in rows[1:]) < 1.0 and train_ppo.Metrics is metrics
    assert [row["optimizer_steps"] for row in rows] == [4, 4, 4] and {row["response_len"] for row in rows} == {6.0}


def test_profile_writes_a_trace_of_one_iteration(quick, tmp_path, capsys):
    trace = tmp_path / "trace.json"
    bench.main(bench.Config(device="cpu", iters=1, warmup=0, profile=str(trace), **FLAGS))
    names = [event.get("name") for event in json.loads(trace.read_text())["traceEvents"]]
    assert names.count("Optimizer.step#AdamW.step") == 4  # 2 epochs x 2 minibatches
    assert f"wrote {trace}" in capsys.readouterr().out


@pytest.mark.parametrize("flags, sentence", [({"n_embd": 30, "n_head": 4}, "must be a multiple of --n_head=4"),
                                             ({"vocab_size": 100}, "must lie in"), ({"preset": "big"}, "tiny, small")])
def test_sizes_that_cannot_be_are_refused_in_a_sentence(flags, sentence):
    with pytest.raises(UserError, match=sentence):
        bench.main(bench.Config(device="cpu", **flags))


@pytest.mark.parametrize("critic, recompute", [(False, False), (True, False), (False, True)])
def test_the_memory_of_a_training_pass_is_what_the_allocator_hands_out(critic, recompute):
    """The estimate runs on fake tensors. Here the same pass is real, and the profiler records each allocation."""
    size = replace(SIZE, n_embd=64, response_len=30, vocab_size=2000)
    model, lens = GPT(size.model).eval(), torch.full((2,), 5)
    tokens, model.trunk.recompute = torch.randint(2000, (2, 35)), recompute
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with torch.profiler.profile(profile_memory=True) as profiler:
        logprobs, values, _ = score_response(model, tokens, lens, 30, entropy=False)
        if critic:
            values = bench.score_values(model, tokens, lens, 30)
        (logprobs.sum() + values.sum()).backward()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    assert bench.pass_bytes(size, 2, False, critic, recompute) == pytest.approx(held.max(), rel=0.1)


def test_recomputing_keeps_one_layers_activations_and_the_inputs_of_all():
    """Of 12 layers about 12 x 16 numbers per token and channel, or 12 + 16; the policy head's share is small here."""
    size = replace(SIZE, n_layer=12, n_embd=64, prompt_len=40, response_len=20)
    plain, recomputed = (bench.pass_bytes(size, 4, False, recompute=recompute) for recompute in (False, True))
    assert recomputed < 0.3 * plain


def test_the_estimate_of_memory_adds_up():
    """A trained weight takes 16 bytes, a frozen one 4, and 2 in a matrix under autocast."""
    parts, N = bench.estimate(SIZE, "shared", 4, bf16=True), bench.n_params(SIZE)
    plain = bench.estimate(SIZE, "shared", 4, bf16=False)
    assert parts["weights"] + parts["gradients"] + parts["AdamW"] == 16 * N
    assert plain["reference"] == plain["reward model"] == 4 * N
    held = GPT(SIZE.model).requires_grad_(False)
    hold_frozen(partial(torch.autocast, "cpu"), torch.device("cpu"), held)
    assert parts["reference"] == sum(p.nbytes for p in held.parameters())
    assert parts["KV cache"] == 2 * 2 * 2 * 32 * 11 * 8  # keys and values, 2 layers, 32 wide, 11 positions, 8 rows
    separate = bench.estimate(SIZE, "separate", 4, bf16=True)
    assert separate["weights"] + separate["gradients"] + separate["AdamW"] == 32 * N
    assert separate["training pass"] > parts["training pass"]


def test_the_kv_cache_takes_what_the_estimate_says():
    """While it grows it may hold one layer more."""
    with bench.LiveBytes() as live:
        cache = KVCache(SIZE.model, SIZE.batch_size, 6, "cpu", torch.float32, room=11)
        cache.grow(11)
    whole = bench.estimate(SIZE, "shared", 4, bf16=False)["KV cache"]
    assert sum(x.nbytes for x in cache.memory) == whole < live.peak <= whole + whole / (2 * SIZE.n_layer)


def test_the_slope_is_the_exponent_of_a_power_law():
    x = np.array([1.0, 2.0, 4.0, 8.0])
    assert scaling.slope(x, 3 * x ** 1.7) == pytest.approx(1.7)


def test_expected_slopes_of_arithmetic():
    """Arithmetic grows with the batch, nearly with the square of a large width, and falls as one over the processes."""
    def over(name, xs):
        return scaling.slope(xs, [scaling.flops_of(replace(scaling.START, **{name: x}), None)["iter"] for x in xs])

    assert over("batch_size", (8, 16, 32)) == pytest.approx(1)
    shares = [scaling.flops_of(scaling.START, n) for n in (1, 2, 4)]
    assert all(scaling.slope((1, 2, 4), [share[stage] for share in shares]) == pytest.approx(-1) for stage in shares[0])
    assert 1.5 < over("n_embd", (64, 128, 256)) < over("n_embd", (2048, 4096)) < 2


def test_processes_get_one_thread_each_and_sizes_get_all(monkeypatch):
    commands, threads = [], []

    def run(command, env, **_):
        commands.append(command), threads.append(env["OMP_NUM_THREADS"])
        return SimpleNamespace(returncode=0, stdout="{}", stderr="")

    monkeypatch.setattr(scaling.subprocess, "run", run)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    for processes in (None, 1, 2):
        scaling.run_bench(scaling.Config(), scaling.START, processes)
    assert threads == ["7", "1", "1"]
    assert ["--nproc_per_node=2" in command for command in commands] == [False, False, True]
    assert all("--batch_size=32" in command for command in commands)


def test_seconds_of_an_all_reduce(monkeypatch):
    """It costs nothing for one GPU. For more, the gradient goes twice through the slowest link."""
    monkeypatch.setattr(scaling, "ASSUMED", {"inside": 100.0, "between": 10.0, "hop": 1.0})
    assert scaling.all_reduce_seconds(800.0, 1) == 0
    assert scaling.all_reduce_seconds(800.0, 8) == pytest.approx(2 * 800 * 7 / 8 / 100 + 2 * 3)
    assert scaling.all_reduce_seconds(800.0, 32) == pytest.approx(14 + 2 * 100 * 3 / 4 / 10 + 2 * 5)


def test_efficiency_on_paper_needs_a_batch_that_grows(capsys):
    """With a fixed batch the efficiency falls as GPUs are added; with one that grows it stays high."""
    scaling.print_paper()
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.endswith("% |")]
    growing, fixed = [[int(row[-2].strip(" %")) for row in part] for part in (rows[:3], rows[3:])]
    assert growing[0] == fixed[0] == 100 and growing[2] > 70 and fixed[2] < 20
