"""
Talk to a checkpoint, or put two policies side by side.

    python sample.py                                                  out/atlas/ppo.pt, interactively
    python sample.py --prompt="Where is Lima?" --n=3                  three answers to one prompt
    python sample.py --checkpoint=out/atlas/sft.pt --versus=out/atlas/ppo.pt

Tokens appear as they are sampled. There is no chat template and no memory: each prompt is a fresh context.
"""

import codecs
from dataclasses import dataclass
from typing import ClassVar, Optional

import torch

import common
import data
from checkpoint import load_checkpoint
from model import GPT, GPTConfig
from rollout import sample_tokens


@dataclass
class Config:
    checkpoint: str = "out/atlas/ppo.pt"  # an sft.pt or ppo.pt
    versus: Optional[str] = None  # a second one, which answers each prompt as well
    prompt: Optional[str] = None  # answer this and exit; default: read prompts from the keyboard
    n: int = 1                    # answers per prompt and checkpoint
    max_new_tokens: int = 64      # longest answer
    temperature: float = 1.0      # below 1 safer, above 1 wilder; PPO trained the policy at its own --temperature
    seed: int = 0                 # the same seed gives the same answers
    device: str = "auto"          # auto (cuda if there is one), cpu or cuda

    DOMAINS: ClassVar[dict] = {"n": "[1, inf)", "max_new_tokens": "[1, inf)", "temperature": "(0, inf)",
                               "seed": common.Flags.DOMAINS["seed"], "device": common.Flags.DOMAINS["device"]}


def load(path, device):
    """(GPT in eval mode, its encoding) from a checkpoint of train_sft.py or train_ppo.py."""
    saved = load_checkpoint(path, "sft", "ppo")
    encoding, _ = data.run_tokenizer(None, None, saved["tokenizer"])
    model = GPT(GPTConfig(**saved["model_config"])).to(device).eval()
    model.load_state_dict(saved["model"], strict=True)
    return model, encoding


def stream(model, encoding, prompt, config, rng):
    """Prints one answer as it is sampled. A character may span tokens, so bytes wait until they make one."""
    ids = data.encode_prompt(encoding, prompt)
    device = model.value_head.linear.weight.device
    characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token, _, _ in sample_tokens(model, torch.tensor([ids], device=device), torch.tensor([len(ids)], device=device),
                                     config.max_new_tokens, temperature=config.temperature, generator=rng):
        if token.item() == encoding.eot_token:
            print(characters.decode(b"", final=True))
            return
        print(characters.decode(data.token_bytes(encoding, token.item())), end="", flush=True)
    print(characters.decode(b"", final=True) + f" [cut at --max_new_tokens={config.max_new_tokens}]")


def main(config):
    common.check_domains(config)
    device = common.pick_device(config)
    policies = [(path, *load(path, device)) for path in (config.checkpoint, config.versus) if path]

    def answer(prompt):
        for path, model, encoding in policies:
            room = model.config.block_size - config.max_new_tokens
            length = len(data.encode_prompt(encoding, prompt))
            common.require(length <= room, f"the prompt has {length} tokens and --max_new_tokens="
                           f"{config.max_new_tokens} leaves room for {room} in block_size={model.config.block_size}: "
                           "shorten one of them")
            rng = common.generator(device, config.seed, prompt)  # the same numbers for both checkpoints
            for _ in range(config.n):
                print(f"{path}:" if config.versus else " ", end="", flush=True)
                stream(model, encoding, prompt, config, rng)

    if config.prompt is not None:
        return answer(config.prompt)
    print("a prompt per line; an empty line or Ctrl-D ends")
    while True:
        try:
            prompt = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not prompt:
            return
        try:
            answer(prompt)
        except common.UserError as error:
            print(error)


if __name__ == "__main__":
    common.main(main, Config, __doc__, data.DataError)
