"""
Talk to a checkpoint or a pretrained model, or put two policies side by side.

    python sample.py                                                  out/atlas/ppo.pt, interactively
    python sample.py --prompt="Where is Lima?" --n=3                  three answers to one prompt
    python sample.py --checkpoint=out/atlas/sft.pt --versus=out/atlas/ppo.pt
    python sample.py --checkpoint=SmolLM2-135M-Instruct               a folder of pretrained weights

Tokens appear as they are sampled. A chat model gets each prompt as a user's message, others as it stands. There is no
memory: each prompt is a fresh context.
"""

import codecs
from dataclasses import dataclass
from typing import Optional

import torch

from pretrained import is_pretrained
from rollout import sample_tokens
from support.checkpoint import load_checkpoint
from support.device import generator, pick_device
from support.flags import Flags, UserError, check_domains, require, run_script
from support.stages import load_policy, load_start
from tokenizer import DataError, encode_prompt, eos_ids, render_messages, run_tokenizer, token_bytes


@dataclass
class Config:
    checkpoint: str = "out/atlas/ppo.pt"  # an sft.pt or ppo.pt, or pretrained weights: a folder or a public name
    versus: Optional[str] = None  # a second one, which answers each prompt as well
    prompt: Optional[str] = None  # answer this and exit; default: read prompts from the keyboard
    chat: Optional[str] = None    # chatml|llama3|plain|none: how a prompt becomes a message; default: the chat model's
    n: int = 1                    # [1, inf) answers per prompt and checkpoint
    max_new_tokens: int = 64      # [1, inf) longest answer
    temperature: float = 1.0      # (0, inf) below 1 safer, above 1 wilder; PPO trained at its --temperature
    seed: int = 0                 # [0, 9e18] the same seed gives the same answers
    device: str = "auto"          # auto|cpu|cuda: auto takes cuda if there is one


def load(path, device):
    """(GPT in eval mode, its encoding, its chat rendering) from a checkpoint of train_sft.py or train_ppo.py, or from
    pretrained weights."""
    saved = load_start(Flags(init_from=path)) if is_pretrained(path) else load_checkpoint(path, "sft", "ppo")
    encoding, tokenizer = run_tokenizer(None, None, saved["tokenizer"])
    return load_policy(saved, device), encoding, tokenizer["chat"]


def encode(encoding, prompt, chat):
    """Ids of a prompt: a user's message, where `chat` is a rendering, or the text as it stands."""
    if chat == "none":
        return encode_prompt(encoding, prompt)
    return render_messages(encoding, [{"role": "user", "content": prompt}], chat)


def stream(model, encoding, ids, config, rng):
    """Prints one answer as it is sampled. A character may span tokens, so bytes wait until they make one."""
    device = model.value_head.linear.weight.device
    characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token, _, _ in sample_tokens(model, torch.tensor([ids], device=device), torch.tensor([len(ids)], device=device),
                                     config.max_new_tokens, temperature=config.temperature, generator=rng):
        if token.item() in eos_ids(encoding):
            print(characters.decode(b"", final=True))
            return
        print(characters.decode(token_bytes(encoding, token.item())), end="", flush=True)
    print(characters.decode(b"", final=True) + f" [cut at --max_new_tokens={config.max_new_tokens}]")


def main(config):
    check_domains(config)
    device = pick_device(config)
    policies = []
    for path in filter(None, (config.checkpoint, config.versus)):
        model, encoding, chat = load(path, device)
        chat = config.chat or ("none" if chat == "plain" else chat)
        policies.append((path, model, encoding, chat))
        if chat != "none":
            print(f"{path}: prompts are user messages, rendered as {chat} (--chat=none: as they stand)")

    def answer(prompt):
        for path, model, encoding, chat in policies:
            room = model.config.block_size - config.max_new_tokens
            ids = encode(encoding, prompt, chat)
            length = len(ids)
            require(length <= room, f"the prompt has {length} tokens and --max_new_tokens="
                    f"{config.max_new_tokens} leaves room for {room} in block_size={model.config.block_size}: "
                    "shorten one of them")
            rng = generator(device, config.seed, prompt)  # the same numbers for both checkpoints
            for _ in range(config.n):
                print(f"{path}:" if config.versus else " ", end="", flush=True)
                stream(model, encoding, ids, config, rng)

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
