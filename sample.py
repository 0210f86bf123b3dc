"""
Talk to a checkpoint, or put two policies side by side.

    python sample.py                                                  out/atlas/ppo.pt, interactively
    python sample.py --prompt="Where is Lima?" --n=3                  three answers to one prompt
    python sample.py --checkpoint=out/atlas/sft.pt --versus=out/atlas/ppo.pt

Tokens appear as they are sampled. There is no chat template and no memory: each prompt is a fresh context.
"""

import codecs
from dataclasses import dataclass
from typing import Optional

import torch

from rollout import sample_tokens
from support.checkpoint import load_checkpoint
from support.device import generator, pick_device
from support.flags import UserError, check_domains, require, run_script
from support.stages import load_policy
from tokenizer import DataError, encode_prompt, run_tokenizer, token_bytes


@dataclass
class Config:
    checkpoint: str = "out/atlas/ppo.pt"  # an sft.pt or ppo.pt
    versus: Optional[str] = None  # a second one, which answers each prompt as well
    prompt: Optional[str] = None  # answer this and exit; default: read prompts from the keyboard
    n: int = 1                    # [1, inf) answers per prompt and checkpoint
    max_new_tokens: int = 64      # [1, inf) longest answer
    temperature: float = 1.0      # (0, inf) below 1 safer, above 1 wilder; PPO trained at its --temperature
    seed: int = 0                 # [0, 9e18] the same seed gives the same answers
    device: str = "auto"          # auto|cpu|cuda: auto takes cuda if there is one


def load(path, device):
    """(GPT in eval mode, its encoding) from a checkpoint of train_sft.py or train_ppo.py."""
    saved = load_checkpoint(path, "sft", "ppo")
    encoding, _ = run_tokenizer(None, None, saved["tokenizer"])
    return load_policy(saved, device), encoding


def stream(model, encoding, prompt, config, rng):
    """Prints one answer as it is sampled. A character may span tokens, so bytes wait until they make one."""
    ids = encode_prompt(encoding, prompt)
    device = model.value_head.linear.weight.device
    characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token, _, _ in sample_tokens(model, torch.tensor([ids], device=device), torch.tensor([len(ids)], device=device),
                                     config.max_new_tokens, temperature=config.temperature, generator=rng):
        if token.item() == encoding.eot_token:
            print(characters.decode(b"", final=True))
            return
        print(characters.decode(token_bytes(encoding, token.item())), end="", flush=True)
    print(characters.decode(b"", final=True) + f" [cut at --max_new_tokens={config.max_new_tokens}]")


def main(config):
    check_domains(config)
    device = pick_device(config)
    policies = [(path, *load(path, device)) for path in (config.checkpoint, config.versus) if path]

    def answer(prompt):
        for path, model, encoding in policies:
            room = model.config.block_size - config.max_new_tokens
            length = len(encode_prompt(encoding, prompt))
            require(length <= room, f"the prompt has {length} tokens and --max_new_tokens="
                    f"{config.max_new_tokens} leaves room for {room} in block_size={model.config.block_size}: "
                    "shorten one of them")
            rng = generator(device, config.seed, prompt)  # the same numbers for both checkpoints
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
        except UserError as error:
            print(error)


if __name__ == "__main__":
    run_script(main, Config, __doc__, DataError)
