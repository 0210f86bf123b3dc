"""
The models of earlier stages: loading them, checking that they fit, and training those that are missing. The train
modules are passed in by train_ppo.py, so that this file imports none of them.
"""

import math
from dataclasses import asdict, dataclass
from typing import Optional

from data import default_max_new_tokens, load_prompts
from model import GPT, GPTConfig
from pretrained import config_of, from_pretrained, is_pretrained, local_path
from reward_model import RewardModel
from support import distributed
from support.checkpoint import digest, file_sha256, load_checkpoint, load_finished
from support.device import activations, describe, hold_frozen, micro_batch_size, rows_and_chunk, spare_memory
from support.flags import UserError, require, resolve_sizes
from support.metrics import print_report, progress
from support.weights import GPT2_NAMES
from tokenizer import get_tokenizer, run_tokenizer, tokenizer_id


def prepare(config, rows_for=(), **trainers):
    """Checks everything that can be wrong with PPO's flags and files, then trains the missing stages with `trainers`
    {stage: train module}. Returns the run's encoding, its tokenizer_id and the Split of its prompts. Prompts of
    the sides in rows_for carry their row."""
    own_sft = config.folder / "sft.pt"  # unfinished or not, it says which tokenizer and sizes the run has
    sft = read_start(config) if config.init_from else load_checkpoint(own_sft, "sft") if own_sft.exists() else None
    encoding, tokenizer = run_tokenizer(config.tokenizer, config.data, sft and sft["tokenizer"], config.chat)
    config.chat = tokenizer["chat"]
    block_size = resolve_sizes(config, sft and sft["model_config"])["block_size"]
    with progress(f"reading {config.data}"):
        resolve_max_new_tokens(config, encoding, block_size)
        split = load_prompts(config.data, encoding, block_size, config.max_new_tokens, config.skip_bad, rows_for,
                             config.chat)
    require(split.heldout or not config.eval, f"--eval is measured on held-out prompts, and {config.data} has none: "
            "give two different prompts or more, or leave the flag out")
    micro_batch_size(config.batch_size // config.minibatches, config.micro_batch_size, 1)  # only for its UserError
    if config.rm:
        checked_reward_model(config, tokenizer, block_size)
    train_missing(config, trainers, encoding, tokenizer, block_size)
    return encoding, tokenizer, split


def resolve_max_new_tokens(config, encoding, block_size):
    """Fills in the default of --max_new_tokens, which depends on the data, and prints it."""
    if config.max_new_tokens is None:
        config.max_new_tokens = default_max_new_tokens(config.data, encoding, block_size, config.skip_bad,
                                                       config.chat)
        if config.data != "atlas":
            print(f"--max_new_tokens={config.max_new_tokens} by default: 95 % of the responses in {config.data} fit "
                  "(64 if there are none), and at most half of --block_size")


def rows_per_pass(config, models, split, device):
    """Responses per forward pass of PPO's update, and rows_and_chunk's chunk. The models are on the device already.
    Raises UserError if the flags do not divide."""
    R, shape, trained = config.max_new_tokens, models.policy.config, list(filter(None, (models.policy, models.critic)))
    per_row = activations(shape, max(map(len, split.train)) + R, config.recompute) * len(trained)
    return rows_and_chunk(config.batch_size // config.minibatches, config.micro_batch_size, (R, shape.vocab_size),
                          per_row, spare_memory(device, *trained), True, 5 if config.ent_coef else 3)


def train_missing(config, trainers, encoding, tokenizer, block_size):
    """Trains sft.pt and rm.pt in out_dir where they are missing or unfinished, with those stages' own defaults. Raises
    UserError before the first trains if one of them would refuse its flags or data, or an existing one does not fit."""
    missing = []
    for stage, needed in (("sft", config.init_from is None), ("rm", config.rm is None and config.reward == "rm")):
        path = config.folder / f"{stage}.pt"
        saved = load_checkpoint(path, stage) if needed and path.exists() else None
        if needed and not (saved and saved["finished"]):
            require(not config.resume, f"--resume continues a run that began with another model than {path}, which is "
                    f"{'unfinished' if saved else 'not there'}: give its --{'init_from' if stage == 'sft' else 'rm'}")
            flags = saved["flags"] | {"resume": True, "overwrite": False} if saved else {}
            flags |= {"init_from": config.init_from} if stage == "rm" else {}
            fields = trainers[stage].Config.__dataclass_fields__
            inherited = {name: getattr(config, name) for name in config.INHERITED if name in fields}
            stage_config = trainers[stage].Config(**flags | inherited)
            stage_config.check()
            with progress(f"reading {config.data} for train_{stage}.py"):
                trainers[stage].load_data(stage_config, encoding, block_size)
            missing.append((path, stage, stage_config))
        elif needed:
            if stage == "rm":
                checked_reward_model(config, tokenizer, block_size)
            note_misfits(path, saved, config)
    for path, stage, stage_config in missing:
        print(f"{path} is {'unfinished' if stage_config.resume else 'not there'}: running train_{stage}.py first\n")
        trainers[stage].train(stage_config)
        print()


@dataclass
class Models:
    """The models that PPO starts from, and {stage: sha256} of the checkpoints that they were read from."""
    policy: GPT
    reference: GPT                       # the SFT policy, frozen
    critic: Optional[GPT]                # None with --critic=shared (the policy's value head) or --advantage=group
    reward_model: Optional[RewardModel]  # None: --reward is a function
    sources: dict


def load_models(config, tokenizer, device, autocast):
    """The Models of a run whose earlier stages are finished. A separate critic starts as the reward model, or without
    one as the SFT policy with a value of 0."""
    with progress("loading the models"):
        sft = load_start(config)
    resolve_lr(config, sft, 4e-4, 5e-6)
    policy, reward_model, rm, critic = load_policy(sft), None, {}, None
    if config.reward == "rm":
        reward_model, rm = load_reward_model(config, tokenizer, policy.config.block_size)
        if rm["sources"]["sft"] != sft["sha256"]:
            print("note: the reward model was calibrated on another SFT policy, so its scores are not in units of this "
                  "one")
    if config.critic == "separate":
        critic = reward_model.as_critic() if reward_model else load_policy(sft)
    sources = {"sft": sft["sha256"], "rm": rm.get("sha256")}
    reference = load_policy(sft).requires_grad_(False)
    distributed.to_device(device, config, autocast, policy, reference, critic, reward_model)
    hold_frozen(autocast, device, reference, reward_model)
    return Models(policy, reference, critic, reward_model, sources)


def print_summary(config, models, experience, split, looked_at):
    """Prints what the run starts with: sizes, device, data, flags, and how many held-out prompts it looks at."""
    micro, chunk, V = experience.micro_batch_size, experience.chunk, models.policy.config.vocab_size
    positions = min(micro * config.max_new_tokens, chunk or math.inf)
    print(f"train_ppo: {models.policy.n_params:,} parameters on "
          f"{describe(experience.device, experience.autocast, config.recompute)}, tokenizer {experience.encoding.name} "
          f"({experience.encoding.n_vocab:,} ids)")
    print_report(config, split.report, f"; a look at held-out prompts samples {looked_at:,} of them")
    steps = config.epochs * config.minibatches
    print(f"{config.batch_size} responses per rollout, {config.epochs} epochs x {config.minibatches} minibatches of "
          f"{config.batch_size // config.minibatches} = {steps} optimizer steps per rollout, {micro} responses per "
          f"forward pass ({4e-6 * positions * V:.0f} MB of logits{' at a time' if chunk else ''})")
    print(" ".join(f"{name}={value}" for name, value in asdict(config).items() if value is not None))


def note_misfits(path, saved, config):
    """Prints a note if a stage found in out_dir was trained on other data or with another seed than this run has."""
    misfits = ["on other data"] if saved["data"] != file_sha256(config.data) else []
    misfits += [f"with --seed={saved['flags']['seed']}"] if saved["flags"]["seed"] != config.seed else []
    if misfits:
        print(f"note: {path} was trained {' and '.join(misfits)}, and this run has --data={config.data} and --seed="
              f"{config.seed}: it is used as it is; train_{saved['stage']}.py --overwrite replaces it")


def read_start(config):
    """What a run starts from: --init_from (an SFT checkpoint or pretrained weights, see from_pretrained), or else
    out_dir/sft.pt. Returns the checkpoint; for pretrained weights, a similar dict without weights. Raises UserError."""
    path = config.init_from or config.folder / "sft.pt"
    if not (config.init_from and is_pretrained(path)):
        start = load_finished(path, "sft")
    else:
        try:
            folder = local_path(path)
            start = {"stage": "sft", "model_config": asdict(config_of(folder)), "flags": {"init_from": str(path)}}
        except (OSError, ValueError) as error:
            raise UserError(f"--init_from={path}: {error}") from None
        gpt2 = start["model_config"]["position"] == "learned"
        has_own = (folder / "tokenizer.json").exists() and path not in GPT2_NAMES
        source = config.tokenizer or (str(path) if has_own else "gpt2" if gpt2 else None)
        require(source, f"--init_from={path} has no tokenizer.json: give --tokenizer")
        start["tokenizer"] = tokenizer_id(get_tokenizer(source), source, config.chat)
        check_vocabulary(path, start)
    start["model_config"]["block_size"] = resolve_sizes(config, start["model_config"])["block_size"]
    return start


def load_start(config):
    """read_start, with the weights. Raises UserError."""
    start = read_start(config)
    if "model" in start:
        return start
    try:
        weights = from_pretrained(config.init_from).state_dict()
    except (OSError, ValueError) as error:
        raise UserError(f"--init_from={config.init_from}: {error}") from None
    return start | {"model": weights, "sha256": digest(weights)}


def check_vocabulary(path, start):
    """Raises UserError if the tokenizer does not belong to the pretrained weights. These may have a few more rows than
    it has ids, up to a round number. Such an id stays in the softmax, and is decoded as the replacement character."""
    rows, tokenizer = start["model_config"]["vocab_size"], start["tokenizer"]
    require(0 <= rows - tokenizer["n_vocab"] <= 512, f"--init_from={path} has {rows:,} tokens and the tokenizer "
            f"{tokenizer['name']} {tokenizer['n_vocab']:,}: give the model's own --tokenizer")


def resolve_lr(config, start, scratch, pretrained):
    """Fills in the default of --lr. It is `pretrained`, and printed, if the run's first weights (or its SFT run's)
    were pretrained; else it is `scratch`."""
    if config.lr is None:
        from_pretrained_weights = start is not None and start.get("flags", {}).get("init_from") is not None
        config.lr = pretrained if from_pretrained_weights else scratch
        if from_pretrained_weights:
            print(f"--lr={config.lr:g} by default, as the run starts from pretrained weights")


def load_policy(checkpoint, device="cpu"):
    """The GPT of a checkpoint, always in eval mode. Dropout would change the log-probs from pass to pass, and the ratio
    with them."""
    policy = GPT(GPTConfig(**checkpoint["model_config"])).to(device).eval()
    policy.load_state_dict(checkpoint["model"], strict=True)
    return policy


def load_reward_model(config, tokenizer, block_size, device="cpu"):
    """(RewardModel in eval mode without gradients, its checkpoint). Raises UserError as checked_reward_model does.
    Prints a note if it was calibrated on other answers."""
    checkpoint = checked_reward_model(config, tokenizer, block_size)
    for name in ("max_new_tokens", "temperature"):
        if checkpoint["flags"][name] != getattr(config, name):
            print(f"note: the reward model was calibrated at --{name}={checkpoint['flags'][name]}, and this run has "
                  f"{getattr(config, name)}, so scores may not start at mean 0 and std 1: train_rm.py has the flag too")
    reward_model = RewardModel(GPTConfig(**checkpoint["model_config"])).to(device).eval().requires_grad_(False)
    reward_model.load_state_dict(checkpoint["model"], strict=True)
    return reward_model, checkpoint


def checked_reward_model(config, tokenizer, block_size):
    """The checkpoint of a finished reward model. Raises UserError if it has another tokenizer, or reads fewer than the
    block_size tokens that the policy may write."""
    checkpoint = load_finished(config.rm or config.folder / "rm.pt", "rm")
    theirs = checkpoint["tokenizer"]
    require(theirs["sha256"] == tokenizer["sha256"], f"the reward model's tokenizer is {theirs['name']} "
            f"({theirs['n_vocab']:,} ids) and the policy's {tokenizer['name']} ({tokenizer['n_vocab']:,} ids): "
            "train both with the same --tokenizer")
    reads = checkpoint["model_config"]["block_size"]
    require(reads >= block_size, f"the reward model reads {reads} tokens and the policy may write {block_size}: "
            "train both from the same SFT checkpoint")
    return checkpoint
