"""Texts on which two tokenizers are likeliest to differ, and a tokenizer.json read by the letter."""

import random

import regex

ALPHABETS = ["abcdefghijklmnopqrstuvwxyz ", "ABCdef  ", "0123456789 .,:-+", " \n\t\r\x0b\f", "'sStTdDmMlLvVrReE ",
             "!?()[]{}#$%&*/=\\\"", " \u00a0\u2003\u3000\u200b\u2028\u2029\u0085\ufeff\u180e",
             "éäßøñœçÅ\u0301\u0308\u0327\u0654", "²Ⅷ٣½१๓一１", "ſKİıǅﬁΣςσ",
             "你好世界。これはテスト한국어",
             "Приветмир", "שלום مرحبا",
             "हिन्दी ไทย", "🙂👍🏽\u200d👩👧🇫🇷❤\ufe0f1\u20e3",
             "\x00\x01\x07\x1b\x7f\x80\x9f", "\ud7ff\ue000\ufffd\uffff\U00010000\U0010ffff"]
FRAGMENTS = ["<|endoftext|>", "<|end", "|>", "I'll", "don't", "it's ", " 'Tis", "we'VE", "12345", "3.14", "  ", "\n\n",
             " \n ", "\r\n", "Where is Lima?", " It is in Peru.", "é", "e\u0301", "٣٤", "x²", "🙂",
             "http://a.b/c?d=e&f", "a_b-c", "— “q”"]


def hostile_texts(encoding, n=2400, seed=0):
    """n texts: runs of one alphabet and mixtures, cut code points, random bytes and code points, glued tokens of the
    encoding, and long runs."""
    rng = random.Random(seed)
    tokens = [token.decode(errors="ignore") for token in encoding.token_byte_values()]

    def code_point():
        return chr(rng.choice([rng.randrange(0xd800), rng.randrange(0xe000, 0x110000)]))

    kinds = [lambda: "".join(rng.choices(rng.choice(ALPHABETS), k=rng.randint(1, 24))),
             lambda: "".join(rng.choice(rng.choice(ALPHABETS)) for _ in range(rng.randint(1, 24))),
             lambda: "".join(rng.choices(FRAGMENTS, k=rng.randint(1, 6))),
             lambda: rng.choice(FRAGMENTS) + "".join(rng.choice(rng.choice(ALPHABETS)) for _ in range(3)),
             lambda: rng.randbytes(rng.randint(1, 24)).decode(errors="replace"),
             lambda: "".join(rng.choices(FRAGMENTS, k=3)).encode()[rng.randint(1, 3):-1].decode(errors="replace"),
             lambda: "".join(code_point() for _ in range(rng.randint(1, 12))),
             lambda: "".join(rng.choices(tokens, k=rng.randint(1, 6)))]
    fixed = ["", *FRAGMENTS, " " * 3000, "a" * 3000, "ab" * 1000 + "!" * 2000, "\n" * 999, "7" * 1000]
    return fixed + [kinds[i % len(kinds)]() for i in range(n - len(fixed))]


def encode_by_file(contents, text):
    """The ids that the contents of a tokenizer.json prescribe for an ordinary text. Of the listed pairs that occur, the
    earliest in the list is joined, the leftmost first."""
    model, (split, _) = contents["model"], contents["pre_tokenizer"]["pretokenizers"]
    order = {tuple(pair): i for i, pair in enumerate(model["merges"])}
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]  # as in GPT-2's encoder.py
    letters = dict(zip(visible + [byte for byte in range(256) if byte not in visible],
                       [chr(byte) for byte in visible] + [chr(256 + i) for i in range(68)]))
    ids = []
    for piece in regex.findall(split["pattern"]["Regex"], text):
        parts = [letters[byte] for byte in piece.encode()]
        if model["ignore_merges"] and "".join(parts) in model["vocab"]:
            parts = ["".join(parts)]
        while found := [(order[pair], i) for i, pair in enumerate(zip(parts, parts[1:])) if pair in order]:
            _, i = min(found)
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        ids += [model["vocab"][part] for part in parts]
    return ids
