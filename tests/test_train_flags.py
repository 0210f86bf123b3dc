"""Tests of the flags of the three train scripts: each has an effect or is refused, combinations, and --compile."""

import dataclasses
import math
import re
import shutil
import sys
from contextlib import ExitStack

import pytest
import torch

import data
import train_ppo
from experiments import rungs
from model import GPT, GPTConfig
from pretrained import save_pretrained
from support import checkpoint, device, stages
from support.flags import UserError, parse_flags
from tiny import ONE_STEP, SIZES, STAGES, metrics, pairs, reward_file, run, write_jsonl
from tokenizer import get_tokenizer


def observe(stage, folder, monkeypatch, capsys, flags, context):
    """What a person can see of a run: why it was refused, metrics, screen, when it saved and where."""
    saves, base, save = [], folder / "out", checkpoint.save_checkpoint
    files = list(folder.iterdir())
    for copy in ("out", "elsewhere"):
        (folder / copy).mkdir()
        for file in files:
            if file.is_file():
                shutil.copy(file, folder / copy)
    flags = {name: value.replace("{folder}", str(folder)) if isinstance(value, str) else value
             for name, value in ({"out_dir": str(base)} | context | flags).items()}
    nan, occupied = flags.pop("nan", False), flags.pop("occupied", False)
    if occupied:
        run(stage, base)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_checkpoint",
                      lambda path, c, *previous: (saves.append((path.parent.name, c["iter"])),
                                                     save(path, c, *previous)))
        patch.setattr(torch, "compile", lambda function, dynamic: (print("compiled"), function)[1])
        patch.setattr(torch.cuda, "is_available", lambda: False)
        for package in ("tensorboard", "wandb"):
            patch.setitem(sys.modules, package, None)
        if nan:
            patch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: torch.tensor(math.nan))
        capsys.readouterr()
        try:
            refused = None if run(stage, base, **flags) else "nothing came back"
        except (UserError, data.DataError, FloatingPointError) as error:
            refused = str(error)
    screen = capsys.readouterr().out.replace(str(folder), "")
    screen = re.sub(r"  eta +[\d:]+|^.*batch_size=.*$", "", screen, flags=re.MULTILINE)  # PPO prints all its flags
    rows = metrics(base, stage) if (base / "metrics.jsonl").exists() and not refused else None
    return {"refused": refused, "metrics": rows, "screen": screen, "saves": saves}


COMMON = {  # flag: (another value, what must differ, what else holds for both runs)
    "out_dir": ("{folder}/elsewhere", "saves", {}), "seed": (1, "metrics", {}),
    "device": ("cuda", "refused", {}),
    "dtype": ("bfloat16", "metrics", {}), "compile": (True, "screen", {}), "fsdp": (True, "refused", {}),
    "max_iters": (2, "metrics", {}),
    "batch_size": (6, "metrics", {}), "micro_batch_size": (5, "refused", {}), "lr": (1e-4, "metrics", {}),
    "recompute": (True, "screen", {}), "lr_decay_iters": (4, "metrics", {}), "grad_clip": (1e-9, "metrics", {}),
    "max_bad_steps": (1, "refused", {"nan": True}),
    "arch": ("llama", "refused", {}), "chat": ("llama3", "refused", {}),
    "n_layer": (2, "refused", {}), "n_head": (4, "refused", {}), "n_embd": (64, "refused", {}),
    "block_size": (80, "refused", {}),
    "log_interval": (1, "screen", {}), "save_interval": (1, "saves", {}), "resume": (True, "refused", {}),
    "overwrite": (True, "refused", {"occupied": True}),
    "skip_bad": (True, "refused", {"data": "{folder}/bad.jsonl"}),
    "tensorboard": (True, "refused", {}), "wandb": (True, "refused", {}),  # in observe they are not installed
    "data": ("{folder}/other.jsonl", "metrics", {}), "tokenizer": ("atlas", "refused", {}),
    "init_from": ("{folder}/other.pt", "metrics", {})}
ROWS = {
    "sft": COMMON | {"tokenizer": ("atlas", "metrics", {}), "init_from": ("{folder}/gpt2", "metrics", {}),
                     "batch_size": (6, "metrics", {}),
                     "arch": ("llama", "metrics", {}),
                     "n_layer": (2, "metrics", {}), "n_head": (4, "metrics", {}),
                     "n_embd": (64, "metrics", {}),
                     "block_size": (80, "metrics", {}), "dropout": (0.5, "metrics", {})},
    "rm": COMMON | {"batch_size": (3, "metrics", {}), "candidates": (2, "metrics", {"data": "atlas"}),
                    "max_new_tokens": (4, "screen", {}), "temperature": (0.5, "screen", {})},
    "ppo": COMMON | {
        "rm": ("{folder}/other_rm.pt", "metrics", {}), "reward": ("{folder}/reward.py:f", "metrics", {}),
        "eval": ("{folder}/reward.py:f", "metrics", {}),
        "samples_per_prompt": (2, "metrics", {}),
        "advantage": ("group", "metrics", {"samples_per_prompt": 2}),
        "minibatches": (3, "metrics", {}),
        "epochs": (1, "metrics", {}), "max_new_tokens": (4, "metrics", {}),
        "temperature": (0.5, "metrics", {}), "kl_coef": (1.0, "metrics", {}),
        "kl_target": (0.1, "metrics", {}),
        "kl_in": ("loss", "metrics", {}), "kl_kind": ("k3", "metrics", {"kl_in": "loss"}),
        "clip": (0.01, "metrics", {}),
        "value_clip": (0.001, "metrics", {}), "vf_coef": (1.0, "metrics", {}),
        "ent_coef": (0.5, "metrics", {}),
        "gamma": (0.5, "metrics", {}), "lam": (0.5, "metrics", {}), "target_kl": (1e-9, "metrics", {}),
        "eos_penalty": (3.0, "metrics", {}), "critic": ("shared", "metrics", {}),
        "sample_interval": (1, "screen", {})},
    "rung": {"objective": ("cpi", "metrics", {"objective": "clip"}),
             "penalty_target": (1e9, "metrics", {"objective": "kl_penalty"}),
             "minibatches": (3, "metrics", {"objective": "clip"})}}


@pytest.mark.parametrize("stage", STAGES)
def test_the_table_of_effects_has_a_row_for_every_flag(stage):
    assert ROWS[stage].keys() == {field.name for field in dataclasses.fields(STAGES[stage].Config)}
    assert ROWS["rung"].keys() == vars(rungs.Config)["__annotations__"].keys()


@pytest.mark.parametrize("stage, flag", [(stage, flag) for stage in ROWS for flag in ROWS[stage]])
def test_every_flag_has_an_effect_or_is_refused(stage, flag, world, worlds, monkeypatch, capsys, baselines):
    value, differs, context = ROWS[stage][flag]
    stage = "ppo" if stage == "rung" else stage

    def prepared():
        folder = world(stage, "atlas" if context.get("data") == "atlas" else "pairs")
        write_jsonl(folder / "other.jsonl", pairs(offset=100))
        write_jsonl(folder / "bad.jsonl", [*pairs(), "a text is no row"])
        reward_file(folder, "[float(len(response)) for response in responses]")
        if flag == "init_from" and stage == "sft":
            save_pretrained(GPT(GPTConfig(vocab_size=257, **SIZES)), get_tokenizer("bytes"), folder / "gpt2")
        elif flag in ("init_from", "rm"):
            for other, name in (("sft", "other.pt"), ("rm", "other_rm.pt")):
                saved = torch.load(worlds["pairs"] / f"{other}.pt", weights_only=True)
                saved.pop("sha256")
                saved["model"] = {key: tensor * 1.5 for key, tensor in saved["model"].items()}
                checkpoint.save_checkpoint(folder / name, saved)
        return folder

    key = stage, str(context)
    if key not in baselines:
        baselines[key] = observe(stage, prepared(), monkeypatch, capsys, {}, context)
    changed = observe(stage, prepared(), monkeypatch, capsys, {flag: value}, context)
    assert changed[differs] != baselines[key][differs]
    if differs != "refused":
        assert changed["refused"] is None and baselines[key]["refused"] is None
    elif changed["refused"] and not context:
        assert f"--{flag}" in changed["refused"] or flag in ("resume", "tokenizer")


@pytest.fixture(scope="module")
def baselines():
    return {}


@pytest.mark.parametrize("flags, says", [
    ({"kl_in": "loss", "kl_kind": "k1"}, "--kl_kind=k1 in the loss does nothing"),
    ({"kl_kind": "k2"}, "--kl_kind is for --kl_in=loss"),
    ({"kl_kind": "k3"}, "--kl_kind is for --kl_in=loss"),
    ({"kl_in": "loss", "kl_kind": "k4"}, "must be one of k2, k3"),
    ({"kl_target": 1.0, "kl_coef": 0.0}, "--kl_coef=0 would stay 0"),
    ({"reward": "f.py:f", "rm": "rm.pt"}, "give one of them"),
    ({"objective": "gae"}, "--(minibatches|epochs)=2, but --objective=gae with .* takes one step per rollout"),
    (ONE_STEP | {"objective": "reinforce", "vf_coef": 0.2}, "--vf_coef=0.2 would do nothing"),
    (ONE_STEP | {"objective": "reward_to_go", "critic": "separate"}, "--critic=separate would do nothing"),
    (ONE_STEP | {"objective": "baseline", "lam": 0.9}, "--lam=0.9 would do nothing"),
    (ONE_STEP | {"objective": "gae", "target_kl": 0.1}, "--target_kl=0.1 would do nothing"),
    ({"objective": "cpi", "clip": 0.3}, "--clip=0.3 would do nothing"),
    ({"objective": "clip", "penalty_target": 0.1}, "--penalty_target=0.1 would do nothing"),
    ({"advantage": "group"}, "set --samples_per_prompt to 2 or more"),
    ({"advantage": "group", "samples_per_prompt": 2, "lam": 0.9}, "--lam=0.9 would do nothing"),
    (ONE_STEP | {"advantage": "group", "samples_per_prompt": 2, "objective": "gae"}, "has no place in --objective=gae"),
    ({"samples_per_prompt": 5}, "--batch_size=12 must be a multiple of --samples_per_prompt=5"),
    ({"batch_size": 10, "minibatches": 4},
     r"--batch_size=10 must be a multiple of --minibatches=4, but 10 = 4 x 2 \+ 2"),
    ({"lr_decay_iters": 2}, "--lr_decay_iters=2 lowers lr to 0 before --max_iters=3"),
    ({"micro_batch_size": 4}, "--micro_batch_size=4 must divide the 6 rows of a step: 6 = 1 x 4 [+] 2"),
    ({"max_new_tokens": 64}, "longer than block_size=64")], ids=lambda x: str(x)[:40])
def test_combinations_of_flags_that_are_refused(flags, says, world):
    """Each would leave a flag without effect, a batch undivided, or a row without room."""
    folder = world("ppo")
    with pytest.raises((UserError, data.DataError), match=says):
        run("ppo", folder, **flags)
    assert not (folder / "ppo.pt").exists() and not (folder / "metrics.jsonl").exists()


# ----------------------------------------------------------------------------------------------------------
# slow: --compile

@pytest.mark.slow
@pytest.mark.parametrize("name, budget, flags", [
    ("pairs", device.CPU_BUDGET, {}), ("pairs", device.CPU_BUDGET, {"recompute": True}),
    ("llama", device.CPU_BUDGET, {}), ("pairs", 2e4, {}), ("llama", 2e4, {"critic": "shared"})], ids=str)
def test_no_length_of_a_prompt_compiles_anything_again(name, budget, flags, world, monkeypatch, capsys, reward_e):
    """The sizes B, T and R of a compiled pass are symbols. The warm-up sees each kind of pass once: the policy's with
    and without gradients, the reference's, the critic's; and then no new length may cost a graph. Nor may the warm-up
    have made so many that torch gave up on compiling, which looks the same from outside. With the small budget the
    policy head reads chunks."""
    monkeypatch.setattr(device, "CPU_BUDGET", budget)
    folder, load, write = world("ppo", name), stages.load_prompts, train_ppo.Metrics.write
    write_jsonl(folder / "pairs.jsonl", [{"prompt": "x" * n, "chosen": "y", "rejected": "n"} for n in range(1, 51)])
    short, long, mixed = slice(0, 10), slice(-10, None), slice(0, 40, 4)
    mixes = [mixed, slice(1, 40, 4), short, long, mixed]

    def by_length(*args):
        split = load(*args)
        split.train.sort(key=len)
        return split

    with ExitStack() as stack:
        def no_more_graphs(metrics, iteration, *args):
            if iteration == 2:
                stack.enter_context(torch.compiler.set_stance("fail_on_recompile"))
            return write(metrics, iteration, *args)

        monkeypatch.setattr(stages, "load_prompts", by_length)
        monkeypatch.setattr(data.BatchOrder, "order", lambda self, step: range(len(self.lengths))[mixes[step]])
        monkeypatch.setattr(train_ppo.Metrics, "write", no_more_graphs)
        stack.enter_context(torch._dynamo.config.patch(fail_on_recompile_limit_hit=True))
        torch._dynamo.reset()
        run("ppo", folder, compile=True, max_iters=5, batch_size=10, reward=reward_e, **flags)
    said = capsys.readouterr().out
    assert "torch.compile failed" not in said and "no samples are shown" not in said
    functions = re.findall(r"torch.compile: (\w+) took .* s at first", said)
    assert functions == ["score_response"] + ["score_values"] * ("critic" not in flags)
    assert len(metrics(folder, "ppo")) == 5


@pytest.mark.parametrize("module, argv, name", [
    (train_ppo, "--advantage=group --samples_per_prompt=2 --lam=0.95", "lam=0.95"),
    (rungs, "--objective=cpi --advantage=group --samples_per_prompt=2 --lam=0.95", "lam=0.95"),
    (rungs, "--objective=cpi --clip=0.2", "clip=0.2")])
def test_a_flag_without_effect_is_refused_even_at_its_default(module, argv, name):
    """Whoever gives it expects it to do something."""
    with pytest.raises(UserError, match=f"--{name} would do nothing"):
        parse_flags(module.Config, argv.split()).check()
