"""
Tests of runs in several processes. Most fork workers that meet through a file, with gloo, on one thread each; the
faults, signals and the command line go through torchrun itself. Nothing here has a GPU.
"""

import faulthandler
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import atlas
import data
import experience
import train_ppo
import train_rm
from experiments import human_comparisons, ladder, overoptimization, scaling, sentiment, trpo
from model import GPT, GPTConfig
from paths import ROOT
from rollout import Rollout, first
from support import device, distributed, optimizer
from support.checkpoint import digest, load_checkpoint
from support.flags import UserError
from tiny import CLOCKS, SIZES, STAGES, metrics, pairs, reward_file, settings, weights, write_jsonl

# A server that has imported everything and computed nothing: its children start at once, and no thread of this process
# is forked with them.
FORKS = multiprocessing.get_context("forkserver")


# ----------------------------------------------------------------------------------------------------------
# several processes on one machine

def worker(folder, rank, n, function, args):
    torch.set_num_threads(1)
    sys.stdout, errors = (open(folder / f"{rank}.{name}", "w") for name in ("out", "err"))
    faulthandler.dump_traceback_later(240, exit=True, file=errors)  # what it waits for, should it hang
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=n)
    try:
        torch.save(function(*args), folder / f"{rank}.result")
        dist.barrier()
    except BaseException:
        traceback.print_exc(file=errors)
        raise
    finally:
        errors.close()


@pytest.fixture(scope="module")
def server():
    FORKS.set_forkserver_preload(["test_distributed"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # else it finds nothing to import, and says nothing
        forkserver.ensure_running()


@pytest.fixture
def in_processes(server, tmp_path):
    """in_processes(n, function, *args): what function(*args) returns in each of n processes, in order of rank."""
    count = iter(range(10**6))

    def call(n, function, *args):
        folder = tmp_path / f"processes{next(count)}"
        folder.mkdir()
        children = [FORKS.Process(target=worker, args=(folder, rank, n, function, args)) for rank in range(n)]
        for child in children:
            child.start()
        for child in children:
            child.join()
        errors = "\n".join(path.read_text() for path in sorted(folder.glob("*.err")))
        assert all(child.exitcode == 0 for child in children), errors
        return [torch.load(folder / f"{rank}.result") for rank in range(n)]
    return call


def train(stage, folder, flags={}):
    """Trains a stage and returns its weights and optimizer as they were saved."""
    STAGES[stage].train(settings(stage, folder, **flags))
    saved = weights(folder, stage, "optimizer")
    # A key's bias does not show in the softmax, nor a score's bias in a difference of scores: their gradients are
    # rounding noise, of which AdamW makes whole steps.
    for name, value in ((name, value) for part in saved.values() for name, value in part.items()):
        if name.endswith("c_attn.bias"):
            value.view(3, -1)[1] = 0
        if name == "head.linear.bias":
            value.zero_()
    return saved


def assert_close(a, b, atol):
    """a and b agree in every number, at any depth, to atol; and in what is no number, altogether."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_close(a[key], b[key], atol)
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_close(x, y, atol)
    elif isinstance(a, (torch.Tensor, float)):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)
    else:
        assert a == b


# ----------------------------------------------------------------------------------------------------------
# the same rollout gives the same gradients, weights and metrics

def given_rollout(model, prompts, prompt_lens, max_new_tokens, *, eos, temperature, generator, copies):
    """In place of generate: ragged responses that depend on a row's place in the whole batch and on nothing else."""
    rows, lens = [], []
    for i in range(len(prompts)):
        rng = torch.Generator().manual_seed(distributed.rank() * len(prompts) + i)
        n = int(torch.randint(1, max_new_tokens + 1, (), generator=rng))
        response = torch.randint(97, 123, (n,), generator=rng).tolist()
        response[-1] = first(eos) if n % 3 else 101
        rows.append(prompts[i, :prompt_lens[i]].tolist() + response)
        lens.append(n)
    lens, R = torch.tensor(lens), max(lens)
    mask = torch.arange(R) < lens.unsqueeze(1)
    tokens, _ = data.pad(rows, first(eos), width=prompts.size(1) + R)
    return Rollout(tokens, prompt_lens, lens, mask, torch.zeros(mask.shape), torch.zeros(mask.shape))


def gradients_of(folder, flags):
    """(gradients of each optimizer step, whitened advantages, metrics) on the given rollouts."""
    steps, advantages, clip, whiten = [], [], torch.nn.utils.clip_grad_norm_, train_ppo.whiten

    def look(params, norm):
        steps.append([p.grad.clone() for p in params if p.grad is not None])
        return clip(params, norm)

    def keep(*args):
        advantages.append(whiten(*args))
        return advantages[-1]

    torch.nn.utils.clip_grad_norm_, train_ppo.whiten, experience.generate = look, keep, given_rollout
    config = settings("ppo", folder, batch_size=24, **flags)
    row = train_ppo.train(config)
    return steps, advantages, {name: value for name, value in row.items() if name not in CLOCKS}


@pytest.mark.parametrize("flags", [
    {},
    pytest.param({"micro_batch_size": 1, "critic": "shared", "kl_in": "loss", "ent_coef": 0.01, "value_clip": 0.1},
                 marks=pytest.mark.slow),
    pytest.param({"advantage": "group", "samples_per_prompt": 4}, marks=pytest.mark.slow), {"world": "llama"}],
    ids=["default", "shared", "group", "llama"])
def test_the_first_update_does_not_depend_on_the_number_of_processes(flags, world, in_processes, tmp_path):
    """Gradients, advantages and metrics of the same rollouts, whose responses differ in length."""
    reward = reward_file(tmp_path, "[len(r) * 0.5 + r.count('e') for r in responses]")
    flags = {"max_iters": 2, "reward": reward} | flags
    kind = flags.pop("world", "pairs")
    alone, = in_processes(1, gradients_of, world("ppo", kind), flags)
    assert alone[2]["ratio_first"] == 0 and len(alone[0]) > 2
    for n in (2, 4):
        for steps, advantages, row in in_processes(n, gradients_of, world("ppo", kind), flags):
            assert_close(steps[0], alone[0][0], atol=1e-6)
            assert_close(advantages[0], alone[1][0], atol=1e-6)
            assert len(steps) == len(alone[0]) and row["ratio_first"] == 0
            assert_close(row, alone[2], atol=1e-4)  # after several steps of AdamW, which rescales the last digits


def test_each_process_sees_the_rows_of_its_prompts(world, in_processes, tmp_path):
    """Parts, rows and the evaluation are those of one process, though 4 do not divide the 6 held-out prompts."""
    (tmp_path / "mine.py").write_text("def f(prompts, responses, rows):\n"
                                      "    assert [row['prompt'] for row in rows] == prompts\n"
                                      "    return {'n': [row['n'] for row in rows], "
                                      "'long': list(map(len, responses))}\n")
    flags = {"max_iters": 1, "reward": f"{tmp_path / 'mine.py'}:f", "eval": f"{tmp_path / 'mine.py'}:f"}
    folders = [world("ppo") for _ in range(3)]
    for folder in folders:
        rows = pairs() + pairs(100) + pairs(200)
        write_jsonl(folder / "pairs.jsonl", [row | {"n": i} for i, row in enumerate(rows)])
    (_, _, alone), = in_processes(1, gradients_of, folders[0], flags)
    assert alone["eval_n"] + alone["eval_long"] == pytest.approx(alone["eval"]) and alone["reward_n"] > 0
    for n, folder in zip((2, 4), folders[1:]):
        for _, _, row in in_processes(n, gradients_of, folder, flags):
            assert_close(row, alone, atol=1e-4)
        assert (folder / "samples.jsonl").read_text().count('"iter": 1') == 6  # by the first process alone


@pytest.mark.slow
@pytest.mark.parametrize("flags", [{}, {"critic": "shared", "kl_in": "loss", "ent_coef": 0.01}],
                         ids=["default", "shared"])
def test_no_gradient_depends_on_the_number_of_processes(flags, world, in_processes, tmp_path):
    """Without a learning rate, or AdamW would make the last digits of a step the next one's first."""
    reward = reward_file(tmp_path, "[len(r) * 0.5 + r.count('e') for r in responses]")
    flags = {"max_iters": 2, "reward": reward, "lr": 0.0} | flags
    (alone, _, _), = in_processes(1, gradients_of, world("ppo"), flags)
    assert len(alone) > 2
    for n in (2, 4):
        for steps, _, _ in in_processes(n, gradients_of, world("ppo"), flags):
            assert_close(steps, alone, atol=1e-6)


@pytest.mark.slow
def test_the_epochs_end_by_the_kl_over_the_tokens_of_all_processes(world, in_processes, tmp_path):
    flags = {"max_iters": 1, "epochs": 1, "reward": reward_file(tmp_path, "list(map(len, responses))")}
    (_, _, row), = in_processes(1, gradients_of, world("ppo"), flags)
    target = 0.7 * 2 * row["approx_kl"]  # a mean over two minibatches, of which the first has none
    for _, _, row in in_processes(4, gradients_of, world("ppo"), flags | {"target_kl": target}):
        assert row["optimizer_steps"] == 1


@pytest.mark.parametrize("stage, exact", [("sft", ("model", "optimizer")), ("rm", ("weights", "optimizer"))])
def test_sft_and_rm_train_the_same_weights_in_1_and_in_2_processes(stage, exact, world, in_processes):
    folder, both, flags = world(stage), world(stage), {"lr": 1e-4}
    alone = train(stage, folder, flags)
    for saved in in_processes(2, train, stage, both, flags):
        assert_close({k: saved[k] for k in exact}, {k: alone[k] for k in exact}, atol=1e-5)
    for mine, theirs in zip(metrics(folder, stage), metrics(both, stage), strict=True):
        assert_close(mine["loss"], theirs["loss"], atol=1e-5)


def rollouts_of(folder, flags):
    own, real = [], experience.generate

    def spy(*args, **kwargs):
        own.append(real(*args, **kwargs))
        return own[-1]

    experience.generate = spy
    train_ppo.train(settings("ppo", folder, **flags))
    return vars(own[0])


def test_processes_sample_different_tokens_from_equal_weights(world, in_processes):
    first, second = in_processes(2, rollouts_of, world("ppo"), {"samples_per_prompt": 12, "max_iters": 1})
    assert torch.equal(first["prompt_lens"], second["prompt_lens"]) and len(first["tokens"]) == 6
    assert first["tokens"].shape != second["tokens"].shape or not torch.equal(first["tokens"], second["tokens"])


def ragged():
    r = distributed.rank()
    rollout = Rollout(torch.full((2, 5 + r), r), torch.tensor([4, 4]), torch.tensor([1, 1 + r]),
                      torch.ones(2, 1 + r, dtype=torch.bool), torch.ones(2, 1 + r), torch.ones(2, 1 + r))
    gathered = distributed.gather(rollout, tokens=9)
    return vars(gathered), vars(distributed.shard(gathered)), distributed.gather([f"text {r}"] * 2)


def test_gathered_rollouts_are_in_order_of_rank_and_padded(in_processes):
    """Each process's own rows are as wide as the gathered ones."""
    for r, (gathered, local, texts) in enumerate(in_processes(2, ragged)):
        assert gathered["tokens"].tolist() == [[0, 0, 0, 0, 0, 9]] * 2 + [[1] * 6] * 2
        assert gathered["mask"].tolist() == [[True, False]] * 2 + [[True, True]] * 2
        assert gathered["logprobs"].tolist() == [[1, 0]] * 2 + [[1, 1]] * 2
        assert gathered["response_lens"].tolist() == [1, 1, 1, 2]
        assert texts == ["text 0"] * 2 + ["text 1"] * 2
        assert all(torch.equal(local[name], gathered[name][2 * r:2 * r + 2]) for name in gathered)


def spare():
    torch.cuda.mem_get_info = lambda gpu: (10_000 - 1_000 * distributed.rank(), 80_000)
    return device.spare_memory(torch.device("cuda"), torch.nn.Linear(10, 10))


def test_processes_plan_with_the_memory_of_the_fullest_gpu(in_processes):
    assert in_processes(2, spare) == [(9_000 - 12 * 110) / 2] * 2


def comparisons():
    torch.manual_seed(0)
    encoding = data.get_tokenizer("atlas")
    policy = GPT(GPTConfig(vocab_size=encoding.n_vocab, **SIZES)).eval()
    config = train_rm.Config(candidates=3, max_new_tokens=4)
    made_by = experience.Experience(config, encoding, *device.setup(config), 64)
    rows = train_rm.atlas_comparisons(made_by, policy, "heldout")
    return [(row.prompt, row.responses, row.pairs) for row in rows]


def test_processes_agree_on_every_comparison(in_processes):
    """They divide the sampling of the candidates among themselves."""
    first, second = in_processes(2, comparisons)
    assert first == second and len(first) == len(atlas.prompts("heldout"))


# ----------------------------------------------------------------------------------------------------------
# whole files

def writes_of(stages, folder):
    """The files in `folder` that this process opens for writing, renames or removes."""
    touched = []

    def hook(event, args):
        if event in ("os.rename", "os.remove", "os.link", "os.rmdir") or event == "open" and isinstance(args[1], str) \
                and set(args[1]) & set("wax+"):
            touched.append(str(args[0]))

    sys.addaudithook(hook)
    for stage in stages:
        train(stage, folder, {"max_iters": 2, "save_interval": 1})
    return [path for path in touched if path.startswith(str(folder))]


def test_only_the_first_process_writes(world, in_processes):
    folder = world("sft")
    first, second = in_processes(2, writes_of, ["sft", "rm", "ppo"], folder)
    assert {Path(path).name for path in first} >= {"sft.pt.tmp", "rm.pt.tmp", "ppo.pt.tmp", "metrics.jsonl", ".lock"}
    assert second == []
    assert [[row["iter"] for row in metrics(folder, stage)] for stage in ("sft", "rm", "ppo")] == [[1, 2]] * 3


def train_in_parts(stage, folder, ends, flags):
    for i, end in enumerate(ends):
        saved = train(stage, folder, flags | {"max_iters": end, "resume": i > 0})
    return digest(saved)


@pytest.mark.parametrize("stage, flags", [
    ("sft", {"dropout": 0.1}), ("rm", {}), pytest.param("ppo", {}, marks=pytest.mark.slow),
    pytest.param("ppo", {"fsdp": True}, marks=pytest.mark.slow)])
def test_two_processes_resume_to_the_last_bit(stage, flags, world, in_processes):
    through, halved = world(stage), world(stage)
    whole = in_processes(2, train_in_parts, stage, through, [4], flags)
    parts = in_processes(2, train_in_parts, stage, halved, [2, 4], flags)
    assert len({*whole, *parts}) == 1
    looks = ("heldout_loss", "heldout_accuracy", "score_heldout", "kl_heldout")  # a run in two parts has two last ones
    assert metrics(through, stage, *looks) == metrics(halved, stage, *looks)


def test_resume_with_another_number_of_processes_is_said(world, in_processes, capsys):
    folder = world("ppo")
    in_processes(2, train, "ppo", folder)
    train("ppo", folder, {"resume": True, "max_iters": 4})
    assert "note: processes was 2 and is 1: the same run, but not with the same samples" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------
# --fsdp

def train_sharded(stage, folder, flags, budget=device.CPU_BUDGET):
    """The final weights, and how many numbers of the parameters this process held while it trained."""
    held, step = [], optimizer.Optimizer.step

    def look(optimizer, *args):
        held.append(sum(p.to_local().numel() if distributed.is_sharded(p) else p.numel() for p in optimizer.params))
        return step(optimizer, *args)

    optimizer.Optimizer.step = look
    device.CPU_BUDGET = budget
    return train(stage, folder, flags), held[-1]


@pytest.mark.parametrize("stage, flags", [
    ("sft", {"log_interval": 1}), ("rm", {"log_interval": 1, "micro_batch_size": 1}),
    pytest.param("ppo", {"sample_interval": 1, "micro_batch_size": 1, "target_kl": 1e-4, "epochs": 4},
                 marks=pytest.mark.slow),
    ("ppo", {"critic": "shared"}), pytest.param("ppo", {"recompute": True}, marks=pytest.mark.slow),
    ("ppo", {"world": "llama"})], ids=["sft", "rm", "ppo", "shared", "recompute", "llama"])
def test_sharded_models_train_alike_and_hold_half_each(stage, flags, world, in_processes):
    flags = flags | {"lr": 1e-4}
    kind = flags.pop("world", "pairs")
    plain, sharded = world(stage, kind), world(stage, kind)
    (whole, n), _ = in_processes(2, train_sharded, stage, plain, flags)
    for saved, m in in_processes(2, train_sharded, stage, sharded, flags | {"fsdp": True}):
        assert_close(saved, whole, atol=1e-5)
        assert m < 0.6 * n
    for mine, theirs in zip(metrics(plain, stage), metrics(sharded, stage), strict=True):
        assert_close(mine, theirs, atol=1e-4)


def train_in_bfloat16(folder, flags):
    """The final weights, and the dtypes in which matrices met a forward pass."""
    dtypes, linear = set(), torch.nn.functional.linear
    torch.nn.functional.linear = lambda x, weight, *bias: dtypes.add(weight.dtype) or linear(x, weight, *bias)
    return train("ppo", folder, flags | {"dtype": "bfloat16"}), dtypes


def test_matrices_are_gathered_in_bfloat16_and_train_alike(world, in_processes):
    """Heads and norms stay float32. Without the rounding of shards no matrix of a pass would be bfloat16."""
    plain, sharded, flags = world("ppo"), world("ppo"), {"lr": 1e-4, "max_iters": 2}
    (whole, dtypes), _ = in_processes(2, train_in_bfloat16, plain, flags)
    for saved, gathered in in_processes(2, train_in_bfloat16, sharded, flags | {"fsdp": True}):
        assert_close(saved, whole, atol=1e-4)
        assert torch.bfloat16 in gathered
    assert [row["ratio_first"] for row in metrics(sharded, "ppo")] == [0.0] * 2


@pytest.mark.parametrize("flags", [{"critic": "shared"}, pytest.param({"ent_coef": 0.1}, marks=pytest.mark.slow)],
                         ids=["shared", "separate"])
def test_sharded_models_train_alike_with_a_head_in_chunks(flags, world, in_processes):
    plain, sharded, flags = world("ppo"), world("ppo"), flags | {"lr": 1e-4, "micro_batch_size": 3, "max_iters": 2}
    (whole, _), _ = in_processes(2, train_sharded, "ppo", plain, flags)
    for saved, _ in in_processes(2, train_sharded, "ppo", sharded, flags | {"fsdp": True}, 1e4):
        assert_close(saved, whole, atol=1e-5)
    assert [row["ratio_first"] for row in metrics(sharded, "ppo")] == [0.0] * 2


def policy_that_samples(folder):
    """[whether the policy that answers in train_rm.py is a shard (before, while it samples)]."""
    seen = []
    for module, name in ((train_rm, "sample"), (experience, "generate")):
        def look(*args, real=getattr(module, name), **kwargs):
            policy = next(arg for arg in args if isinstance(arg, GPT))
            seen.append(all(map(distributed.is_sharded, policy.parameters())))
            return real(*args, **kwargs)

        setattr(module, name, look)
    train_rm.train(settings("rm", folder, fsdp=True))
    return seen


def test_the_policy_of_the_calibration_is_whole_only_while_it_samples(world, in_processes):
    for seen in in_processes(2, policy_that_samples, world("rm")):
        assert seen == [True, False]


@pytest.mark.parametrize("stage", ["sft", pytest.param("rm", marks=pytest.mark.slow),
                                   pytest.param("ppo", marks=pytest.mark.slow)])
def test_a_sharded_checkpoint_goes_on_in_one_process_and_back(stage, world, in_processes):
    there, flags = world(stage), {"lr": 1e-4}
    in_processes(2, train, stage, there, flags | {"max_iters": 2, "fsdp": True})
    train(stage, there, flags | {"max_iters": 3, "resume": True})
    back, _ = in_processes(2, train, stage, there, flags | {"max_iters": 4, "fsdp": True, "resume": True})
    if stage == "sft":  # which samples nothing, so that the number of processes changes nothing
        assert_close(back, train(stage, world(stage), flags | {"max_iters": 4}), atol=1e-5)


# ----------------------------------------------------------------------------------------------------------
# what cannot be shared out

def refusal(stage, folder, flags):
    with pytest.raises(UserError) as error:
        train(stage, folder, flags)
    return str(error.value)


@pytest.mark.parametrize("stage, flags, said", [
    ("sft", {"batch_size": 9}, "train_sft.py takes 9 rows per iteration, which 2 processes cannot share evenly"),
    ("ppo", {"batch_size": 12, "minibatches": 4}, "3 rows of a step cannot be shared evenly by 2 processes"),
    ("ppo", {"batch_size": 12, "micro_batch_size": 2}, "must divide the 3 rows of a process in a step"),
    ("ppo", {"fsdp": True, "compile": True}, "--fsdp and --compile")])
def test_what_does_not_go_with_two_processes_is_refused_by_each_of_them(stage, flags, said, world, in_processes):
    assert all(said in sentence for sentence in in_processes(2, refusal, stage, world(stage), flags))


def test_a_stage_that_cannot_be_divided_is_refused_by_name(in_processes, tmp_path):
    """It is refused before the first stage trains."""
    flags = {"out_dir": str(tmp_path / "out"), "data": "atlas", "tokenizer": None, "batch_size": 24, "minibatches": 1}
    for sentence in in_processes(3, refusal, "ppo", tmp_path, flags):  # of train_sft.py's own 96 rows, each takes 32
        assert sentence.startswith("train_rm.py takes 16 rows per iteration, which 3 processes cannot share")
    assert not list((tmp_path / "out").glob("*.pt"))


def single(start, config):
    with pytest.raises(UserError, match="runs in a single process: start it without torchrun"):
        start(config)


def test_fsdp_without_torchrun_is_refused(world):
    with pytest.raises(UserError, match="--fsdp shards a model over processes"):
        settings("sft", world("sft"), fsdp=True).check()


@pytest.mark.parametrize("experiment", [human_comparisons, ladder, overoptimization, scaling, sentiment, trpo])
def test_experiments_under_torchrun_are_refused(experiment, in_processes):
    in_processes(1, single, experiment.Config.check if experiment is trpo else experiment.main, experiment.Config())


# ----------------------------------------------------------------------------------------------------------
# torchrun: faults and signals

@pytest.fixture
def torchrun():
    """torchrun(stage, folder, **flags) starts a script in two processes; all of them are gone after the test."""
    started = []

    def start(stage, folder, **flags):
        config = vars(settings(stage, folder, **flags))
        default = vars(STAGES[stage].Config())
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                   str(ROOT / f"train_{stage}.py"), *(f"--{k}={v}" for k, v in config.items() if v != default[k])]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                        env=os.environ | {"OMP_NUM_THREADS": "1"}))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
            process.wait(60)


def workers(process):
    """Process ids of the two scripts that a torchrun has started, the first process first."""
    ids = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ids = [pid for pid in ids if b"train_" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return sorted(map(int, ids), key=lambda pid: b"\0LOCAL_RANK=1" in Path(f"/proc/{pid}/environ").read_bytes())


def wait_for_iteration(folder, stage, n, process):
    while not (folder / "metrics.jsonl").exists() or len(metrics(folder, stage)) < n:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)


@pytest.mark.parametrize("dies", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_process_that_dies_ends_the_run_within_a_minute(dies, world, torchrun):
    folder = world("ppo")
    run = torchrun("ppo", folder, max_iters=10**6, save_interval=1)
    wait_for_iteration(folder, "ppo", 2, run)
    both, began = workers(run), time.time()
    os.kill(both[dies], signal.SIGKILL)
    run.communicate(timeout=60)
    assert run.returncode != 0 and time.time() - began < 60
    assert not any(Path(f"/proc/{pid}").exists() for pid in both)
    assert load_checkpoint(folder / "ppo.pt", "ppo")["iter"] >= 1


@pytest.mark.slow
def test_a_signal_to_any_process_ends_all_after_the_same_iteration(world, torchrun):
    """The run can then be resumed."""
    folder = world("ppo")
    run = torchrun("ppo", folder, max_iters=10**6, log_interval=1)
    wait_for_iteration(folder, "ppo", 2, run)
    os.kill(workers(run)[1], signal.SIGTERM)
    out, err = run.communicate(timeout=300)
    saved = load_checkpoint(folder / "ppo.pt", "ppo")
    assert run.returncode != 0 and saved["iter"] == metrics(folder, "ppo")[-1]["iter"] and not saved["finished"]
    assert len([line for line in out.splitlines() if line.startswith("ppo ")]) == saved["iter"]  # one process prints
    run = torchrun("ppo", folder, max_iters=saved["iter"] + 1, resume=True)
    out, err = run.communicate(timeout=300)
    assert run.returncode == 0, err
    assert out.count("continuing after iteration") == 1 and metrics(folder, "ppo")[-1]["iter"] == saved["iter"] + 1


@pytest.mark.slow
def test_a_refusal_that_is_the_same_in_all_processes_is_printed_once(world, torchrun):
    for stage, flags, said in (("sft", {"lr": -1.0}, "train_sft.py: --lr=-1.0 must lie in [0, inf)\n"),
                               ("rm", {"batch_size": "x"}, "train_rm.py: argument --batch_size")):
        out, err = torchrun(stage, world(stage), **flags).communicate(timeout=300)
        assert err.count(said) == 1 and err.count("train_sft.py: ") + err.count("train_rm.py: ") == 1


@pytest.mark.slow
def test_torchrun_forwards_its_signal_and_all_leave_in_good_order(world, torchrun):
    folder = world("sft")
    run = torchrun("sft", folder, max_iters=10**6)
    wait_for_iteration(folder, "sft", 2, run)
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=300)
    assert run.returncode != 0 and "Connection closed" not in err
    assert "this iteration is the last and will be saved if all processes finish it; a second signal" in err
    assert load_checkpoint(folder / "sft.pt", "sft")["iter"] == metrics(folder, "sft")[-1]["iter"]


@pytest.mark.slow
def test_an_error_in_one_process_is_told_by_that_one_and_ends_all(world, torchrun, tmp_path):
    body = "[float('nan') if __import__('os').environ['LOCAL_RANK'] == '1' else 1.0 for r in responses]"
    run = torchrun("ppo", world("ppo"), reward=reward_file(tmp_path, body))
    out, err = run.communicate(timeout=300)
    assert run.returncode != 0 and "process 1: the reward function f returned nan for the prompt" in err
    assert "process 0: another process is gone or cannot be reached" in err


@pytest.mark.slow
def test_an_error_that_only_speaks_of_gloo_is_no_lost_process(world, torchrun, tmp_path):
    run = torchrun("ppo", world("ppo"), reward=reward_file(tmp_path, "{}['gloomy']"))
    out, err = run.communicate(timeout=300)
    assert run.returncode != 0 and "the reward function f raised KeyError('gloomy') for the prompt" in err
    assert "reward.py\", line 2, in f" in err and "another process is gone" not in err
