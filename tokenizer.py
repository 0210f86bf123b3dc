"""
Text <-> ids: the built-in vocabularies, tiktoken's encodings, a model's tokenizer.json in and out, chat messages.

Text is encoded as given: nothing is stripped, and a special token's name in a user's text is ordinary text. EOS ends
every response, and takes the place of an empty prompt.
"""

import base64
import difflib
import gzip
import hashlib
import re
import unicodedata
import zlib
from pathlib import Path

import tiktoken
import torch

import atlas
from support.tokenizer_file import EOT, GPT2_SPLIT, Refused, last_merge, oniguruma, printable, read_tokenizer_file


class DataError(ValueError):
    """A problem with the user's data or tokenizer, in one sentence: what is wrong, where, what to do."""


class NoToken(DataError):
    """A text that a tokenizer has no tokens for."""


# ---------------------------------------------------------------------------------------------------------------------
# from a name or a file to an encoding


def get_tokenizer(name):
    """The tiktoken.Encoding called `name`: "atlas"; "bytes" (256 byte tokens and EOT); an encoding that
    tiktoken knows, such as "gpt2"; a path to a `.tiktoken` ranks file; or a model's tokenizer.json, the folder that
    holds it, or the public name of a model that was downloaded. Its eot_token is the EOS that ends responses.
    Raises DataError if the name is unknown, the encoding cannot be fetched or the file is malformed."""
    name, known = str(name), tiktoken.list_encoding_names()
    for folder in (Path(name), hub_folder(name)):
        if name not in known and (folder / "tokenizer.json").is_file():
            return PretrainedEncoding(folder / "tokenizer.json")
    if name.endswith(".json"):
        return PretrainedEncoding(Path(name))
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
                        "give atlas, bytes, a path that ends in .tiktoken, a folder with a tokenizer.json, or one of "
                        + ", ".join(known))
    if EOT not in encoding.special_tokens_set:
        raise DataError(f"tokenizer {name} has no {EOT}, which ends every response: choose another")
    return encoding


def run_tokenizer(flag, data, saved=None, chat=None):
    """(encoding, its tokenizer_id) of a run: --tokenizer and --chat if given, else those `saved` in a checkpoint, else
    atlas for atlas and gpt2 for files. Raises DataError if the checkpoint was trained with others."""
    name = flag or (saved["source"] if saved else "atlas" if data == "atlas" else "gpt2")
    encoding = get_tokenizer(name)
    identity = tokenizer_id(encoding, name, chat or (saved and saved["chat"]))
    for field in ("sha256", "eos", "bos") if saved else ():
        if identity[field] != saved.get(field):
            what = "" if field == "sha256" else f": {field} is {identity[field]} and was {saved.get(field)}"
            raise DataError(f"tokenizer {name} ({encoding.n_vocab:,} ids) is not the one of the checkpoint "
                            f"({saved['name']}, {saved['n_vocab']:,} ids){what}: leave --tokenizer out, or retrain")
    if saved and identity["chat"] != saved["chat"]:
        raise DataError(f"--chat={chat} is not the rendering of the checkpoint, {saved['chat']}: leave --chat out, or "
                        "retrain")
    if identity["chat"] not in (*renderers(encoding), "none"):
        raise DataError(f"--chat={chat} needs special tokens that {name} does not have: give plain or none")
    return encoding, identity


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


def tokenizer_id(encoding, source=None, chat=None):
    """A tokenizer's identity in a checkpoint, plain values: name (for people), source (the flag's value, to find it
    again; default: the name), n_vocab, sha256 of the vocabulary, eos (the ids that end a response), bos and pad (an id
    or None), special_tokens {text: id}, and chat (how messages are rendered; default: by the special tokens). The hash
    covers the tokens in the order of their ids, each with its length in front."""
    digest = hashlib.sha256()
    for token in range(encoding.n_vocab):
        try:
            text = encoding.decode_single_token_bytes(token)
            digest.update(len(text).to_bytes(4, "little") + text)
        except KeyError:  # some encodings skip ids; as a length, these bytes exceed that of any token
            digest.update(b"\xff" * 4)
    special = {text: encoding.encode_single_token(text) for text in sorted(encoding.special_tokens_set)}
    return {"name": encoding.name, "source": source or encoding.name, "n_vocab": encoding.n_vocab,
            "sha256": digest.hexdigest(), "eos": eos_ids(encoding), "bos": getattr(encoding, "bos", None),
            "pad": getattr(encoding, "pad", None), "special_tokens": special, "chat": chat or renderers(encoding)[0]}


def read_lines(path):
    """Yields (line number, bytes). A missing, unreadable or truncated file raises DataError even with
    skip_bad, because nobody knows how much of it is lost."""
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
    """Ids of a prompt, after the BOS if there is one. An empty prompt becomes [EOS], because EOS also came before each
    text in GPT-2's training. encode_ordinary, because "<|endoftext|>" in a user's text is ordinary text."""
    return bos_ids(encoding) + encoding.encode_ordinary(text) or [encoding.eot_token]


def encode_response(encoding, text):
    """Ids of a response and the EOS that ends it; an empty response is EOS alone."""
    return encoding.encode_ordinary(text) + [encoding.eot_token]


def decode(encoding, ids):
    """The text of ids. EOS is left out, and an id that the encoding does not have (cl100k_base skips some, a model may
    have more rows than its tokenizer) becomes the replacement character instead of an exception."""
    eos = eos_ids(encoding)
    pieces = [token_bytes(encoding, token) for token in ids if token not in eos]
    return b"".join(pieces).decode("utf-8", errors="replace")


def token_bytes(encoding, token):
    """The bytes of one id; those of the replacement character for an id that the encoding does not have."""
    try:
        return encoding.decode_single_token_bytes(token)
    except KeyError:
        return "\ufffd".encode()


def eos_ids(encoding):
    """The ids that end a response. The first is the one we write and pad with; a model may sample any of them."""
    return getattr(encoding, "eos", None) or [encoding.eot_token]


def bos_ids(encoding):
    """[id of the token that begins every text], or [] for a tokenizer without one."""
    return [bos] if (bos := getattr(encoding, "bos", None)) is not None else []


# ---------------------------------------------------------------------------------------------------------------------
# chat messages as ids

ROLES = "system", "user", "assistant"
CHATS = {  # (a message, the beginning of the answer); <|words|> are special tokens
    "chatml": ("<|im_start|>{role}\n{content}<|im_end|>\n", "<|im_start|>assistant\n"),
    "llama3": ("<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>",
               "<|start_header_id|>assistant<|end_header_id|>\n\n"),
    "plain": ("{Role}:\n{content}\n\n", "Assistant:\n")}
SPECIAL = re.compile(r"(<\|\w+\|>)")


def renderers(encoding):
    """The renderings of messages that an encoding has the special tokens for, the default first."""
    return [chat for chat, (message, _) in CHATS.items()
            if set(SPECIAL.findall(message)) <= encoding.special_tokens_set]


def render_messages(encoding, messages, chat):
    """Ids of a prompt: messages [{"role", "content"}] and the beginning of the assistant's answer. `chat` is a format:
    "chatml" (SmolLM2, Qwen), "llama3", or "plain" (roles as text). Its special tokens become their ids; the content of
    a message is always ordinary text. No default system message is added, unlike in SmolLM2's and Llama 3's own
    templates.

    Raises DataError for an unknown role, a last message of the assistant, or special tokens that the encoding lacks."""
    if chat not in renderers(encoding):
        raise DataError(f"--chat={chat} cannot render messages with tokenizer {encoding.name}: give "
                        + " or ".join(renderers(encoding)))
    roles = [message["role"] for message in messages]
    if not roles or not set(roles) <= set(ROLES) or roles[-1] == "assistant":
        raise DataError(f"messages with the roles {roles} cannot be rendered: give {', '.join(ROLES)}, and do not "
                        "end with a message of the assistant")
    message, answer = CHATS[chat]
    ids, text = bos_ids(encoding), ""
    for template, filled in [*((message, m) for m in messages), (answer, {"role": "", "content": ""})]:
        for piece in SPECIAL.split(template):
            if SPECIAL.fullmatch(piece):
                ids += encoding.encode_ordinary(text) + [encoding.encode_single_token(piece)]
                text = ""
            else:
                text += piece.format(role=filled["role"], Role=filled["role"].title(), content=filled["content"])
    return ids + encoding.encode_ordinary(text)


# ---------------------------------------------------------------------------------------------------------------------
# a model's tokenizer.json as an encoding

class PretrainedEncoding(tiktoken.Encoding):
    """The encoding of a model's tokenizer.json and the files beside it: eos (the ids that end a response, the first of
    which is written), bos (the id in front of every text, or None), pad (an id or None), nfc (whether text is
    normalised), chat_template (Jinja, or None) and contents (of tokenizer.json). Raises DataError."""

    def __init__(self, file):
        try:
            read = read_tokenizer_file(file)
        except Refused as error:
            raise DataError(str(error)) from None
        super().__init__(file.resolve().parent.name, pat_str=read.pop("pattern"), mergeable_ranks=read.pop("ranks"),
                         special_tokens=read.pop("special_tokens"))
        missing = bytes(byte for byte in range(256) if bytes([byte]) not in self._mergeable_ranks)
        self.missing = missing and re.compile(b"[" + re.escape(missing) + b"]")
        vars(self).update(read)

    @property
    def eot_token(self):
        return self.eos[0]

    def encode_ordinary(self, text):
        """Ids of a text. Raises NoToken for a byte without a token, where tiktoken would panic."""
        text = unicodedata.normalize("NFC", text) if self.nfc else text
        if self.missing and (found := self.missing.search(raw := text.encode("utf-8", "replace"))):
            character = text[len(raw[:found.start()].decode("utf-8", "ignore"))]
            raise NoToken(f"tokenizer {self.name} has no token for {character!r}: leave such texts out")
        return super().encode_ordinary(text)


def hub_folder(name):
    """Where the files of a public model are kept once they are downloaded."""
    return Path(torch.hub.get_dir()) / "checkpoints" / name


# ---------------------------------------------------------------------------------------------------------------------
# an encoding as the tokenizer.json of Hugging Face's `tokenizers`

def tokenizer_json(encoding):
    """The contents of a tokenizer.json that gives the same ids, and the same text for them, as the encoding. Its
    vocabulary is in GPT-2's alphabet of one printable character per byte.

    Raises DataError if a special token is spelled like an ordinary one."""
    if isinstance(encoding, PretrainedEncoding):
        return encoding.contents
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
            # ignore_merges: a piece that is itself a token stays whole, as in tiktoken, even if no merges produce it
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
                      "vocab": vocab | special, "merges": [list(map(printable, pair)) for pair in pairs if pair]}}
