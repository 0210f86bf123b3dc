"""
Text <-> ids: the built-in vocabularies, tiktoken's encodings, prompts and responses as ids, and tokenizer.json.

Text is encoded as given: nothing is stripped or added, and a special token's name in a user's text is text. EOS ends
every response and, where a prompt is empty, starts it.
"""

import base64
import difflib
import gzip
import hashlib
import math
import re
import zlib
from pathlib import Path

import tiktoken

import atlas


class DataError(ValueError):
    """A problem with the user's data or tokenizer, in one sentence: what is wrong, where, what to do."""


# ---------------------------------------------------------------------------------------------------------------------
# from a name or a file to an encoding

EOT = "<|endoftext|>"
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


def get_tokenizer(name):
    """The tiktoken.Encoding called `name`: "atlas"; "bytes" (256 byte tokens and EOT); an encoding that
    tiktoken knows, such as "gpt2"; or a path to a `.tiktoken` ranks file. Its eot_token is <|endoftext|>.
    Raises DataError if the name is unknown, the encoding cannot be fetched or the file is malformed."""
    name, known = str(name), tiktoken.list_encoding_names()
    if name == "atlas":
        encoding = atlas.tokenizer()
    elif name == "bytes":
        ranks = {bytes([byte]): byte for byte in range(256)}
        encoding = tiktoken.Encoding(name, pat_str="(?s:.)", mergeable_ranks=ranks,
                                     special_tokens={EOT: 256})
    elif name.endswith(".tiktoken"):
        encoding = read_ranks(name)
    elif name in known:
        try:
            encoding = tiktoken.get_encoding(name)
        except (OSError, ValueError) as error:  # a network error is an OSError, a wrong hash a ValueError
            raise DataError(f"tokenizer {name} could not be fetched ({type(error).__name__}): connect once, "
                            "or set TIKTOKEN_CACHE_DIR to a writable folder that holds its files") from error
    else:
        close = difflib.get_close_matches(name.lower(), ["atlas", "bytes", *known], n=1)
        raise DataError(f"unknown tokenizer {name!r}{f' (did you mean {close[0]}?)' if close else ''}: "
                        f"give atlas, bytes, a path that ends in .tiktoken, or one of {', '.join(known)}")
    if EOT not in encoding.special_tokens_set:
        raise DataError(f"tokenizer {name} has no {EOT}, which ends every response: choose another")
    return encoding


def run_tokenizer(flag, data, saved=None):
    """(encoding, its tokenizer_id) of a run: --tokenizer if given, else the one `saved` in a checkpoint, else
    atlas for atlas and gpt2 for files. Raises DataError if the checkpoint was trained with another one."""
    name = flag or (saved["source"] if saved else "atlas" if data == "atlas" else "gpt2")
    encoding = get_tokenizer(name)
    if saved and tokenizer_id(encoding, name)["sha256"] != saved["sha256"]:
        raise DataError(f"tokenizer {name} ({encoding.n_vocab:,} ids) is not the one of the checkpoint "
                        f"({saved['name']}, {saved['n_vocab']:,} ids): leave --tokenizer out, or retrain")
    return encoding, tokenizer_id(encoding, name)


def read_ranks(path):
    """A `.tiktoken` file (lines "base64 rank", ranks 0 to n-1) -> Encoding with GPT-2's split pattern and EOT
    as id n. Raises DataError for a malformed line, a gap in the ranks, a byte without a token."""
    ranks = {}
    for line, raw in read_lines(path):
        if not raw.strip():
            continue
        try:
            token, rank = raw.split()
            token, rank = base64.b64decode(token, validate=True), int(rank)
        except ValueError:
            raise DataError(f'{path}:{line}: expected a line of the form "base64 rank"') from None
        if token in ranks:
            raise DataError(f"{path}:{line}: an earlier line has this token already")
        ranks[token] = rank
    for byte in range(256):
        if bytes([byte]) not in ranks:
            raise DataError(f"{path}: byte {byte} has no token, so not every text could be encoded: add it")
    n = len(ranks)
    if sorted(ranks.values()) != list(range(n)):
        raise DataError(f"{path}: {n:,} tokens must have the ranks 0 to {n - 1:,}, each once: renumber them")
    return tiktoken.Encoding(Path(path).stem, pat_str=GPT2_SPLIT, mergeable_ranks=ranks,
                             special_tokens={EOT: n})


def tokenizer_id(encoding, source=None):
    """A tokenizer's identity in a checkpoint, plain values: name (for people), source (the flag, where to find it
    again; default the name), n_vocab, sha256 of the vocabulary, eos (the ids that end a response), special_tokens
    {text: id}, and chat (how messages are rendered). The hash takes each token, length first, in the order of ids."""
    digest = hashlib.sha256()
    for token in range(encoding.n_vocab):
        try:
            text = encoding.decode_single_token_bytes(token)
            digest.update(len(text).to_bytes(4, "little") + text)
        except KeyError:  # some encodings leave ids out; no token is as long as these bytes would say
            digest.update(b"\xff" * 4)
    special = {text: encoding.encode_single_token(text) for text in sorted(encoding.special_tokens_set)}
    return {"name": encoding.name, "source": source or encoding.name, "n_vocab": encoding.n_vocab,
            "sha256": digest.hexdigest(), "eos": [encoding.eot_token], "special_tokens": special, "chat": "plain"}


def read_lines(path):
    """Yields (line number, bytes). A file that is missing, unreadable or cut is a DataError that no skip_bad
    forgives: nobody knows how much of it is gone."""
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rb") as file:
            yield from enumerate(file, 1)
    except EOFError:
        raise DataError(f"{path}: the gzip data is cut short: fetch the file again") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: the gzip data is corrupt ({error}): fetch the file again") from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}: give a file that can be read") from None


# ---------------------------------------------------------------------------------------------------------------------
# texts as ids, ids as text

def encode_prompt(encoding, text):
    """Ids of a prompt; an empty one becomes [EOS], which starts a text too, as in GPT-2's training.
    encode_ordinary, because "<|endoftext|>" in a user's text is text."""
    return encoding.encode_ordinary(text) or [encoding.eot_token]


def encode_response(encoding, text):
    """Ids of a response and the EOS that ends it; an empty response is EOS alone."""
    return encoding.encode_ordinary(text) + [encoding.eot_token]


def decode(encoding, ids):
    """The text of ids. EOS is left out, and an id that the encoding does not have (cl100k_base skips some, and an
    untrained policy may sample one) becomes the replacement character instead of an exception."""
    pieces = [token_bytes(encoding, token) for token in ids if token != encoding.eot_token]
    return b"".join(pieces).decode("utf-8", errors="replace")


def token_bytes(encoding, token):
    """The bytes of one id; those of the replacement character for an id that the encoding does not have."""
    try:
        return encoding.decode_single_token_bytes(token)
    except KeyError:
        return "\ufffd".encode()


# ---------------------------------------------------------------------------------------------------------------------
# an encoding as the tokenizer.json of Hugging Face's `tokenizers`

def tokenizer_json(encoding):
    """The contents of a tokenizer.json that gives the same ids, and the same text for them, as the encoding. Its
    vocabulary is in GPT-2's alphabet of one printable character per byte.

    Raises DataError if a special token is spelled like an ordinary one."""
    ranks = {token: encoding.encode_single_token(token) for token in encoding.token_byte_values()}
    special = {text: encoding.encode_single_token(text) for text in sorted(encoding.special_tokens_set)}
    pairs = [last_merge(token, ranks) for token in sorted(ranks, key=ranks.get)]
    vocab = {printable(token): rank for token, rank in ranks.items()}
    for text in special:
        if text in vocab:
            raise DataError(f"tokenizer {encoding.name} has {text} twice, as a special and as an ordinary token, and a "
                            "tokenizer.json can hold one of them: choose another tokenizer")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": oniguruma(encoding._pat_str)}, "behavior": "Isolated",
             "invert": False}
    return {"version": "1.0", "truncation": None, "padding": None,
            "added_tokens": [{"id": token, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
                              "normalized": False, "special": True} for text, token in special.items()],
            "normalizer": None, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
            "post_processor": None, "decoder": byte_level,
            # ignore_merges: a piece that is a token is that token, as in tiktoken, even if no merges lead to it
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
                      "vocab": vocab | special, "merges": [list(map(printable, pair)) for pair in pairs if pair]}}


def last_merge(token, ranks):
    """The two tokens that BPE joins into `token`, or None for one that it never makes, such as a single byte.

    tiktoken joins whatever spells a token, and `tokenizers` joins listed pairs. One pair per token is enough for the
    same ids: BPE does to a stretch of text, until a merge crosses its ends, what it does to that stretch by itself."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        found = [ranks.get(a + b, math.inf) for a, b in zip(parts, parts[1:])]
        i = found.index(min(found))
        if found[i] == math.inf:
            return None
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts if len(parts) == 2 else None


# Bytes that are no visible character become the characters from U+0100 on, in their order.
HIDDEN = [byte for byte in range(256) if not 33 <= byte <= 126 and not 161 <= byte <= 255 or byte == 173]
ALPHABET = {byte: 256 + i for i, byte in enumerate(HIDDEN)}


def printable(token):
    """The bytes of a token in GPT-2's alphabet."""
    return token.decode("latin-1").translate(ALPHABET)


def oniguruma(pattern):
    """A split pattern in the dialect of `tokenizers`. (?s:.) is unknown there. {1,3}+ would not be possessive but
    repeated, and before the end of an alternative the plain {1,3} matches the same."""
    return re.sub(r"(\{\d+,\d*\})\+(?=\||$)", r"\1", pattern.replace("(?s:.)", r"[\s\S]"))


def hub_folder(name):
    import torch
    return Path(torch.hub.get_dir()) / "checkpoints" / name


def eos_ids(encoding):
    return [encoding.eot_token]


class PretrainedEncoding(tiktoken.Encoding):
    pass
