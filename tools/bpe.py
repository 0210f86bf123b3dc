"""
Learns a byte-pair vocabulary from text, for --tokenizer: a small one makes a small model's logits cheap.

    python -m tools.bpe reviews.jsonl.gz --vocab_size=2048 --save=reviews.tiktoken
    python train_sft.py --data=reviews.jsonl.gz --tokenizer=reviews.tiktoken

The .tiktoken file has lines of "base64 rank". The text is split into words as in GPT-2. <|endoftext|> is added later.
"""

import argparse
import base64
import sys
from collections import Counter, defaultdict

import regex  # tiktoken needs it too

import data
from support.checkpoint import atomic_write
from tokenizer import GPT2_SPLIT, DataError


def merge(pieces, ranks):
    """Applies tiktoken's rule to a list of bytes: of all neighbours that make a token, join those of the lowest rank,
    the leftmost first, until no neighbours make one."""
    while True:
        found = [(ranks[a + b], i) for i, (a, b) in enumerate(zip(pieces, pieces[1:])) if a + b in ranks]
        if not found:
            return pieces
        _, i = min(found)
        pieces = pieces[:i] + [pieces[i] + pieces[i + 1]] + pieces[i + 2:]


def learn_bpe(texts, vocab_size):
    """{token: rank} with the 256 bytes first, then the commonest pair of neighbours again and again [Sennrich et al.
    2016, 1508.07909], up to vocab_size tokens or until no pair is left. A pair counts by what it spells, not by how it
    splits, because tiktoken joins any neighbours that spell a token."""
    words = Counter(word.encode() for text in texts for word in regex.findall(GPT2_SPLIT, text))
    ranks = {bytes([byte]): byte for byte in range(256)}
    pieces, counts, where = {}, Counter(), defaultdict(dict)  # dicts, as the order of sets changes from run to run

    def add(word, new):
        pieces[word] = new
        for pair in map(bytes.__add__, new, new[1:]):
            counts[pair] += words[word]
            where[pair][word] = True

    for word in words:
        add(word, [bytes([byte]) for byte in word])
    while len(ranks) < vocab_size:
        token = max(counts, key=counts.get, default=b"")
        if not counts[token]:
            break
        ranks[token] = len(ranks)
        for word in where.pop(token):
            old = pieces[word]
            for pair in map(bytes.__add__, old, old[1:]):
                counts[pair] -= words[word]
                where[pair].pop(word, None)
            add(word, merge(old, ranks))
    return ranks


def write_ranks(path, ranks):
    with atomic_write(path) as file:
        for token, rank in ranks.items():
            file.write(base64.b64encode(token) + b" %d\n" % rank)


def texts_of(row):
    return " ".join(value for value in row.values() if isinstance(value, str))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="a .jsonl or .jsonl.gz file; all texts of a row are read")
    parser.add_argument("--vocab_size", type=int, default=4096, help="tokens, with the 256 bytes but no <|endoftext|>")
    parser.add_argument("--save", required=True, help="the .tiktoken file to write")
    options = parser.parse_args(argv)
    try:
        texts, _ = data.read_rows(options.data, convert=texts_of)
        ranks = learn_bpe(texts, options.vocab_size)
        write_ranks(options.save, ranks)
    except (DataError, OSError) as error:
        print(f"bpe.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"wrote {options.save}: {len(ranks):,} tokens from {len(texts):,} rows")


if __name__ == "__main__":
    main()
