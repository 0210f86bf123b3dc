"""Files for the tests of data and tokenizers."""

import gzip
import json

import pytest

from paths import DATA
from tokenizer import get_tokenizer


def write(path, *rows):
    """One line per row: bytes as they are, strings as UTF-8, anything else as JSON."""
    lines = [row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode()
             for row in rows]
    data = b"\n".join(lines) + b"\n"
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def gpt2(monkeypatch):
    if not (DATA / "tiktoken_cache").is_dir():
        pytest.skip("no tiktoken cache")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(DATA / "tiktoken_cache"))
    return get_tokenizer("gpt2")
