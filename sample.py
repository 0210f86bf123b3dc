"""
Talk to a checkpoint or a pretrained model, or compare two policies.

    python sample.py                                                  out/atlas/ppo.pt, interactively
    python sample.py --prompt="Where is Lima?" --n=3                  three answers to one prompt
    python sample.py --checkpoint=SmolLM2-135M-Instruct               a folder of pretrained weights: a chat
    python sample.py --checkpoint=SmolLM2-135M-Instruct --versus=out/chat/ppo.pt       before and after, side by side

A chat model keeps the conversation until you type /new. Any other model gets each line as a prompt in a fresh context.
With --versus both policies get the same questions and the same random numbers, and each keeps its own answers.
"""

import codecs
import shutil
import textwrap
from dataclasses import dataclass
from itertools import zip_longest
from typing import Optional

import tiktoken
import torch

from model import GPT
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
    versus: Optional[str] = None  # a second one, whose answers are shown beside those of the first
    prompt: Optional[str] = None  # answer this and exit; default: read prompts from the keyboard
    system: Optional[str] = None  # a system message for a chat model to begin with; default: none
    chat: Optional[str] = None    # chatml|llama3|plain|none: how a prompt becomes a message; default: the chat model's
    n: int = 1                    # [1, inf) answers per prompt and checkpoint; a conversation keeps the last one
    max_new_tokens: Optional[int] = None  # [1, inf) longest answer; default: a quarter of block_size, at most 256
    temperature: float = 1.0      # (0, inf) below 1 safer, above 1 wilder; PPO trained at its --temperature
    seed: int = 0                 # [0, 9e18] the same seed gives the same answers
    device: str = "auto"          # auto|cpu|cuda: auto takes cuda if there is one


@dataclass
class Speaker:
    """A policy and its conversation so far, messages [{"role", "content"}]; empty without a chat."""
    path: str
    model: GPT
    encoding: tiktoken.Encoding
    chat: str
    messages: list


def load(path, device):
    """(GPT in eval mode, its encoding, its chat rendering) from a checkpoint of train_sft.py or train_ppo.py, or from
    pretrained weights."""
    saved = load_start(Flags(init_from=path)) if is_pretrained(path) else load_checkpoint(path, "sft", "ppo")
    encoding, tokenizer = run_tokenizer(None, None, saved["tokenizer"])
    return load_policy(saved, device), encoding, tokenizer["chat"]


def encode(speaker, prompt, max_new_tokens):
    """Ids of the conversation with a prompt as its next message; without a chat, of the prompt alone. Raises
    UserError if they leave less room than max_new_tokens: nothing is cropped."""
    if speaker.chat == "none":
        ids = encode_prompt(speaker.encoding, prompt)
    else:
        ids = render_messages(speaker.encoding, [*speaker.messages, {"role": "user", "content": prompt}], speaker.chat)
    block_size, begun = speaker.model.config.block_size, any(m["role"] == "assistant" for m in speaker.messages)
    require(len(ids) <= block_size - max_new_tokens, f"the {'conversation' if begun else 'prompt'} has {len(ids)} "
            f"tokens and --max_new_tokens={max_new_tokens} leaves room for {block_size - max_new_tokens} in "
            f"block_size={block_size}: " + ("/new begins another" if begun else "shorten one of them"))
    return ids


def stream(speaker, ids, config, rng):
    """Yields the text of one answer, piece by piece as it is sampled, and finally a note if it was cut, else "". A
    character may span tokens, so bytes wait until they make one."""
    device = speaker.model.value_head.linear.weight.device
    characters, cut = codecs.getincrementaldecoder("utf-8")(errors="replace"), True
    for token, _, _ in sample_tokens(speaker.model, torch.tensor([ids], device=device),
                                     torch.tensor([len(ids)], device=device), config.max_new_tokens,
                                     temperature=config.temperature, generator=rng):
        if token.item() in eos_ids(speaker.encoding):
            cut = False
            break
        yield characters.decode(token_bytes(speaker.encoding, token.item()))
    yield characters.decode(b"", final=True)
    yield f" [cut at --max_new_tokens={config.max_new_tokens}]" if cut else ""


def side_by_side(texts):
    """Texts as columns of equal width that fill the screen."""
    width = max(8, shutil.get_terminal_size().columns // len(texts) - 3)
    columns = [[part for line in text.splitlines() for part in textwrap.wrap(line, width) or [""]] for text in texts]
    return "\n".join(" | ".join(part.ljust(width) for part in row).rstrip()
                     for row in zip_longest(*columns, fillvalue=""))


def reply(speakers, prompt, config):
    """Prints --n answers of each speaker: one speaker's as they are sampled, two speakers' side by side once complete.
    A chat remembers the last. Raises UserError for a prompt that does not fit, before any speaker answers."""
    contexts = [encode(speaker, prompt, config.max_new_tokens) for speaker in speakers]
    rngs = [generator(speaker.model.value_head.linear.weight.device, config.seed, prompt) for speaker in speakers]
    for _ in range(config.n):
        answers = [[] for _ in speakers]
        for speaker, ids, rng, pieces in zip(speakers, contexts, rngs, answers):
            for piece in stream(speaker, ids, config, rng):
                if len(speakers) == 1:
                    print(piece if pieces else f" {piece}", end="", flush=True)
                pieces.append(piece)
        print(side_by_side(["".join(pieces) for pieces in answers]) + "\n" if len(speakers) > 1 else "")
    for speaker, (*pieces, _) in zip(speakers, answers):
        if speaker.chat != "none":
            speaker.messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": "".join(pieces)}]


def main(config):
    check_domains(config)
    device, speakers = pick_device(config), []
    opening = [] if config.system is None else [{"role": "system", "content": config.system}]
    for path in filter(None, (config.checkpoint, config.versus)):
        model, encoding, chat = load(path, device)
        chat = config.chat or ("none" if chat == "plain" else chat)
        require(config.system is None or chat != "none", f"--system begins a conversation and {path} gets prompts "
                "unchanged: leave it out, or choose a --chat")
        speakers.append(Speaker(path, model, encoding, chat, list(opening)))
        if chat != "none":
            print(f"{path}: prompts are user messages, rendered as {chat} (--chat=none: unchanged)")
    config.max_new_tokens = config.max_new_tokens or max(1, min(
        256, *(speaker.model.config.block_size // 4 for speaker in speakers)))
    if config.versus:
        print(side_by_side([config.checkpoint, config.versus]) + "\n")
    if config.prompt is not None:
        return reply(speakers, config.prompt, config)
    chats = any(speaker.chat != "none" for speaker in speakers)
    print("a message per line; /new begins another conversation, Ctrl-D ends" if chats else
          "a prompt per line; Ctrl-D ends")
    while True:
        try:
            prompt = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if chats and prompt.strip() == "/new":
            for speaker in speakers:
                speaker.messages = list(opening)
            print("a new conversation")
        elif prompt:
            try:
                reply(speakers, prompt, config)
            except UserError as error:
                print(error)


if __name__ == "__main__":
    run_script(main, Config, __doc__, DataError)
