"""
A model's tokenizer.json, read into the ranks, pattern and special tokens of a tiktoken.Encoding; and GPT-2's alphabet,
in which such a file spells bytes.
"""

import hashlib
import json
import math
import re
from pathlib import Path

import torch

EOT = "<|endoftext|>"
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# GPT-2's pattern once each digit is a piece by itself. Blanks before a digit end a piece there, so they stay together.
DIGITS_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++|\p{N}| ?[^\s\p{L}\p{N}]++|\s+(?![^\s\p{N}])|\s"


class Refused(ValueError):
    """Why a file is not read, in one sentence."""


def read_tokenizer_file(file):
    """Reads a tokenizer.json and the files beside it into a dict of pattern, ranks, special_tokens, eos, bos, pad, nfc,
    chat_template and contents. With these, tiktoken gives exactly the ids of `tokenizers`. Raises Refused for a file
    where it would not."""
    def refuse_unless(fits, what):
        if not fits:
            raise Refused(f"{file}: {what}: give another --tokenizer")

    try:
        raw = file.read_bytes()
        contents = json.loads(raw)
        model, added = contents["model"], contents.get("added_tokens") or []
        refuse_unless(model.get("type", "BPE") == "BPE", f"a model of type {model.get('type')} is not byte-level BPE")
        refuse_unless(not model.get("byte_fallback"), "byte_fallback is sentencepiece's: only byte-level BPE is read")
        for field in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            refuse_unless(not model.get(field), f"{field}={model.get(field)!r} is not supported")
        for token in added:
            refuse_unless(not any(token.get(field) for field in ("lstrip", "rstrip", "single_word")),
                          f"the added token {token['content']!r} takes in the text around it, which is not supported")
        steps = flatten(contents.get("normalizer"), "normalizers")
        refuse_unless(all(step == {"type": "NFC"} for step in steps), f"the normalizer {steps} is not supported")
        pattern = split_pattern(flatten(contents.get("pre_tokenizer"), "pretokenizers"))
        refuse_unless(pattern, f"the pre_tokenizer {contents.get('pre_tokenizer')} is not supported")
        bos = begin_token(flatten(contents.get("post_processor"), "processors"))
        refuse_unless(bos is not False, f"the post_processor {contents['post_processor']} is not supported")
        special = {token["content"]: token["id"] for token in added}
        printed = {token: rank for token, rank in model["vocab"].items() if token not in special}
        foreign = next((token for token in printed if not set(token) <= BYTES.keys()), None)
        refuse_unless(foreign is None, f"the token {foreign!r} is not made of bytes in GPT-2's alphabet")
        ranks = {unprintable(token): rank for token, rank in printed.items()}
        merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        merges = [(unprintable(a), unprintable(b)) for a, b in merges]
    except OSError as error:
        raise Refused(f"{file}: {error.strerror or error}: give a file that can be read") from None
    except Refused:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Refused(f"{file} is not a tokenizer.json ({type(error).__name__}: {error}): fetch it again") from None
    seen = Path(torch.hub.get_dir()) / "checked_tokenizers" / hashlib.sha256(raw).hexdigest()
    if not seen.exists():
        refuse_unless(merges_by_rank(ranks, merges, model.get("ignore_merges")), "its merges are not in the order of "
                      "its ids, so tiktoken would give other ids")
        try:
            seen.parent.mkdir(parents=True, exist_ok=True)
            seen.touch()
        except OSError:  # a folder that cannot be written: the merges are checked again next time
            pass
    return {"pattern": pattern, "ranks": ranks, "special_tokens": special, "bos": special.get(bos), "nfc": bool(steps),
            "contents": contents} | beside(file, special)


def flatten(step, key):
    """The list of a Sequence's steps, of a single step, or of none."""
    return [] if step is None else step[key] if step["type"] == "Sequence" else [step]


def split_pattern(steps):
    """The regular expression that cuts a text into pieces as the steps of a pre_tokenizer do; None for unknown ones."""
    *before, last = steps or [{}]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if last.get("use_regex", True):
        return GPT2_SPLIT if not before else DIGITS_SPLIT if before == [{"type": "Digits", "individual_digits": True}] \
            else None
    if [step["type"] for step in before] != ["Split"] or before[0]["behavior"] != "Isolated" or before[0]["invert"]:
        return None
    return before[0]["pattern"].get("Regex")


def begin_token(steps):
    """The special token that a post_processor puts before a text; None if it puts none; False if unsupported."""
    for step in steps:
        if step["type"] == "TemplateProcessing":
            *before, text = step["single"]
            if "Sequence" not in text or len(before) > 1:
                return False
            return before[0]["SpecialToken"]["id"] if before else None
        if step["type"] != "ByteLevel":
            return False
    return None


def merges_by_rank(ranks, merges, ignore_merges):
    """Whether merging by rank, as tiktoken does, gives the same as merging by the list. Two conditions suffice. The
    first merges that make each token are in the order of ids. And each token's bytes, merged alone, end in the two
    parts that its merge joins: a stretch of text is merged as if it were alone until a merge crosses its ends. With
    ignore_merges both look a whole piece up first, so a token that no merge makes does no harm."""
    first = {}
    for a, b in merges:
        first.setdefault(a + b, [a, b])
    made = [ranks.get(token, -1) for token in first]
    if made != sorted(made) or made[:1] == [-1]:
        return False
    parts = {token: last_merge(token, ranks) for token in ranks if len(token) > 1}
    return all(pair == first.get(token) if pair else ignore_merges for token, pair in parts.items())


def beside(file, special):
    """{eos, pad, chat_template} from the files beside a tokenizer.json. Raises Refused if none names an EOS."""
    def fields(name):
        path = file.parent / name
        try:
            return json.loads(path.read_bytes()) if path.is_file() else {}
        except ValueError:
            raise Refused(f"{path} is not JSON: is it half a download?") from None

    tokenizer, generation, config = map(fields, ("tokenizer_config.json", "generation_config.json", "config.json"))

    def named(name):  # "<|im_end|>", or an object that has it as its content
        text = tokenizer.get(name)
        return special.get(text["content"] if isinstance(text, dict) else text)

    eos = generation.get("eos_token_id", config.get("eos_token_id"))
    eos = [named("eos_token")] if eos is None else eos if isinstance(eos, list) else [eos]
    eos = [special.get(EOT)] if eos == [None] else sorted(eos, key=lambda token: token != named("eos_token"))
    if None in eos:
        raise Refused(f"{file.parent}: no file names an EOS, which ends every response: give a tokenizer_config.json "
                        "with eos_token")
    pad, template = named("pad_token"), file.parent / "chat_template.jinja"
    return {"eos": eos, "pad": generation.get("pad_token_id") if pad is None else pad,
            "chat_template": template.read_text("utf-8") if template.is_file() else tokenizer.get("chat_template")}


# ---------------------------------------------------------------------------------------------------------------------
# how merges and bytes are spelled

def last_merge(token, ranks):
    """The two tokens that BPE joins into `token`, or None for one that it never makes, such as a single byte.

    tiktoken joins any neighbours that spell a token, and `tokenizers` joins listed pairs. One pair per token is enough
    for the same ids: until a merge crosses its ends, BPE merges a stretch of text as if it were alone."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        found = [ranks.get(a + b, math.inf) for a, b in zip(parts, parts[1:])]
        i = found.index(min(found))
        if found[i] == math.inf:
            return None
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts if len(parts) == 2 else None


# Bytes that are not a visible character become the characters from U+0100 on, in order.
HIDDEN = [byte for byte in range(256) if not 33 <= byte <= 126 and not 161 <= byte <= 255 or byte == 173]
ALPHABET = {byte: 256 + i for i, byte in enumerate(HIDDEN)}
BYTES = {chr(ALPHABET.get(byte, byte)): byte for byte in range(256)}


def printable(token):
    """The bytes of a token, spelled in GPT-2's alphabet."""
    return token.decode("latin-1").translate(ALPHABET)


def unprintable(text):
    """The bytes that a text in GPT-2's alphabet spells."""
    return bytes(BYTES[character] for character in text)


def oniguruma(pattern):
    """A split pattern in the dialect of `tokenizers`. (?s:.) is unknown there. {1,3}+ would not be possessive but
    repeated, and before the end of an alternative the plain {1,3} matches the same."""
    return re.sub(r"(\{\d+,\d*\})\+(?=\||$)", r"\1", pattern.replace("(?s:.)", r"[\s\S]"))

