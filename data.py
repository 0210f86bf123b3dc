"""
From rows of text to batches of ids: rows of JSONL, three kinds of records, right padding, the order of batches.

A row of the user's file becomes a record of ids. A file of pairs serves all three stages.

    {"prompt", "chosen", "rejected"}, or an HH transcript {"chosen", "rejected"}    Comparison
    {"prompt", "response"}, or {"text"}, whose prompt is empty                      Demonstration
    {"prompt"}                                                                      Prompt

Each of these texts may be a list of messages {"role", "content"} instead, {"messages"} is a demonstration, and chosen
and rejected may be whole conversations. `chat` renders messages; a plain text gets no template.

Text is used as given: nothing is stripped, added or cropped. Other keys are kept for reward functions that take rows
and ignored otherwise. A row that cannot be read stops the run with `file:line: reason`, or is counted with skip_bad. A
row that reads well but cannot be used is dropped and counted. A mistake that nearly every row shares is reported. A
file in another format is refused with the Python code that converts it. There is no streaming and no packing: a file
is read once, whole.
"""

import hashlib
import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
import torch

import atlas
from tokenizer import ROLES, DataError, NoToken, encode_prompt, encode_response, read_lines, render_messages
from tokenizer import get_tokenizer as get_tokenizer  # re-exported, because other code imports it from here


# ---------------------------------------------------------------------------------------------------------------------
# rows of a file

class BadRow(Exception):
    """Why a row cannot be read. `code`: two lines of Python that convert such rows, or None."""
    def __init__(self, reason, code=None):
        super().__init__(reason)
        self.code = code


class Unusable(Exception):
    """Why a row that reads well is dropped."""


class Row(NamedTuple):
    """The texts of a row: two responses (chosen, rejected), one, or none. The prompt is a text, or the messages
    ((role, content), ...) of a conversation."""
    prompt: str | tuple
    responses: tuple = ()
    problem: str = ""  # makes the row unusable in every stage
    has_prompt: bool = True  # False for {"text"}
    source: Optional[dict] = None  # the dict in the file, if it is kept

    @property
    def key(self):
        """Decides the side of the split: rows with the same prompt must fall on the same side."""
        return (self.prompt if isinstance(self.prompt, str) else json.dumps(self.prompt)) or "".join(self.responses[:1])


def read_rows(path, skip_bad=False, convert=dict):
    """The rows of a JSONL or JSONL.gz file in UTF-8, with or without BOM; blank lines are ignored.

    convert: dict of one row -> what to keep of it; it raises BadRow for a bad one.
    Returns (rows, bad): the converted rows in file order, and `path:line: reason` of each bad one. Raises
    DataError at the first bad row unless skip_bad, and always if the file is empty, missing, damaged, or in another
    format."""
    rows, bad, other = [], [], None
    for line, raw in read_lines(path):
        if line == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        if not raw.strip():
            continue
        code = None
        try:
            row = json.loads(raw.decode("utf-8").rstrip("\r\n"))
            if not isinstance(row, dict):
                raise BadRow(f"a row must be a JSON object, not {type(row).__name__}")
            rows.append(convert(row))
            continue
        except BadRow as error:
            reason, code = str(error), error.code
        except UnicodeDecodeError as error:
            reason = f"byte {error.start + 1} of the line is not UTF-8"
        except json.JSONDecodeError as error:
            reason = f"malformed JSON ({error.msg}, column {error.colno})"
        except (RecursionError, ValueError):  # Python's own limits on nesting and on digits
            reason = "malformed JSON (too deeply nested, or an integer with thousands of digits)"
        if not rows and not bad:
            refuse_other_format(path, raw)
        bad.append(f"{path}:{line}: {reason}")
        other = other or (code and bad[-1] + how_to_convert(path, code))
        if not skip_bad:
            raise DataError(other or f"{bad[0]} (correct the row, or skip and count such rows with --skip_bad)")
    if not rows and other:
        raise DataError(other)
    if not rows and not bad:
        raise DataError(f"{path}: the file has 0 rows")
    return rows, bad


def text_at(row, key):
    """row[key]. Raises BadRow if it is missing or is not a text that a tokenizer can take."""
    if key not in row:
        raise missing(row, key)
    return checked_text(row[key], f'"{key}"')


def checked_text(text, where):
    if not isinstance(text, str):
        raise BadRow(f"{where} must be a string, not {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRow(f"{where} has a lone surrogate, half of a character") from None
    if len(text) >= 1_000_000:  # a run of this many blanks makes tiktoken panic, which `except Exception` misses
        raise BadRow(f"{where} has {len(text):,} characters; the limit is 999,999")
    return text


def to_row(row, n_responses, chat="none"):
    """The dict of one row -> Row with at least n_responses. Raises BadRow. A row reads the same in every
    stage, even texts that the stage does not use, so that all stages split a file alike."""
    messages = [key for key in ("messages", "prompt", "chosen", "rejected", "response") if is_messages(row.get(key))]
    if messages:
        if chat == "none":
            raise BadRow(f'"{messages[0]}" is a list of messages, which --chat=none refuses')
        return messages_to_row(row, n_responses)
    if "chosen" in row or "rejected" in row:
        chosen, rejected = text_at(row, "chosen"), text_at(row, "rejected")
        if "prompt" in row:
            return Row(text_at(row, "prompt"), (chosen, rejected))
        if "\n\nAssistant:" not in chosen and not set(PROMPTS).isdisjoint(row):
            raise missing(row, "prompt")
        return transcripts_to_row(chosen, rejected)
    if n_responses == 2:
        raise missing(row, "chosen")
    if "text" in row and "prompt" not in row and "response" not in row:
        return Row("", (text_at(row, "text"),), has_prompt=False)
    prompt = text_at(row, "prompt")
    return Row(prompt, (text_at(row, "response"),)) if n_responses or "response" in row else Row(prompt)


def is_messages(value):
    return isinstance(value, list) and all(isinstance(message, dict) for message in value)


def messages_to_row(row, n_responses):
    """The dict of a row with lists of messages -> Row. Raises BadRow."""
    prompt = None if "prompt" not in row else \
        conversation_at(row, "prompt") if is_messages(row["prompt"]) else text_at(row, "prompt")
    keys = ["chosen", "rejected"] if "chosen" in row or "rejected" in row else \
        ["messages"] if "prompt" not in row else ["response"] if n_responses or "response" in row else []
    if n_responses == 2 and len(keys) < 2:
        raise missing(row, "chosen")
    prompts, responses = [], []
    for key in keys:
        *before, (role, response) = conversation_at(row, key) if is_messages(row.get(key)) else \
            [("assistant", text_at(row, key))]
        if role != "assistant":
            raise BadRow(f'"{key}" must end with a message of the assistant, not of "{role}"')
        prompts.append(tuple(before) or prompt)  # an answer without a conversation follows the row's prompt
        responses.append(response)
    first = prompts[0] if prompts else prompt
    if first is None:
        raise missing(row, "prompt")
    role, asked = ("user", first) if isinstance(first, str) else first[-1]
    if role == "assistant":
        raise BadRow("the prompt ends with a message of the assistant, so there is nothing to answer")
    # A "prompt" beside whole conversations is their beginning, or the text of that beginning's last message
    same = len(set(prompts)) < 2 and prompt in (None, first, asked)
    return Row(first, tuple(responses), "" if same else "the prompts differ")


def conversation_at(row, key):
    """((role, content), ...) of a list of messages. Raises BadRow."""
    if not row[key]:
        raise BadRow(f'"{key}" has no messages')
    for number, message in enumerate(row[key], 1):
        where = f'message {number} of "{key}"'
        if not {"role", "content"} <= set(message):
            raise BadRow(f'{where} has no "role" or no "content"')
        if message["role"] not in ROLES:
            raise BadRow(f"{where} has the role {json.dumps(message['role'])}; known are {', '.join(ROLES)}")
        checked_text(message["content"], f'"content" of {where}')
    return tuple((message["role"], message["content"]) for message in row[key])


def transcripts_to_row(chosen, rejected):
    """Two HH transcripts -> Row. The prompt is the text up to and including the last "\\n\\nAssistant:"."""
    prompts, responses = [], []
    for text in (chosen, rejected):
        before, turn, response = text.rpartition("\n\nAssistant:")
        if not turn:
            raise BadRow('missing key "prompt", and a transcript has no "\\n\\nAssistant:" to split it at')
        prompts.append(before + turn)
        responses.append(response)
    return Row(prompts[0], tuple(responses), "the two prompts differ" if prompts[0] != prompts[1] else "")


def split_rows(rows):
    """Rows -> (train, heldout). Holds out 5 % of the distinct keys, at least one but never all: those with
    the smallest sha256, so that the split does not depend on the order of the file, a seed or the stage."""
    keys = sorted({row.key for row in rows}, key=lambda key: hashlib.sha256(key.encode()).digest())
    heldout = set(keys[: min(max(1, len(keys) // 20), max(0, len(keys) - 1))])
    return [row for row in rows if row.key not in heldout], [row for row in rows if row.key in heldout]


# ---------------------------------------------------------------------------------------------------------------------
# files of another format and rows of another shape: a name, and two lines of Python that convert the file
#
# In this code FILE is the file, NEW the converted one, OPEN the function that opens FILE. Imports are added later.

WRITE = "open(NEW, 'w').writelines(json.dumps({}) + '\\n' for {})"
UNPACK = "shutil.copyfileobj({}, open(NEW, 'wb'))"
PANDAS = "pandas.{}(FILE).to_json(NEW, orient='records', lines=True)  # pip install pandas {}"
TEXT = "OPEN(FILE, 'rt', encoding='utf-8-sig')"
ROWS = "r in map(json.loads, filter(bytes.strip, OPEN(FILE, 'rb')))"
SEVERAL_LINES = f"r in json.loads('[' + {TEXT}.read().replace('}}\\n{{', '}},\\n{{') + ']')"
PROMPTS = "prompt", "instruction", "question", "query", "input"
RESPONSES = "response", "completion", "output", "answer", "target"
RANKED = "answers", "responses", "completions"
COLUMNS = (r"(?i)(?![{\[])(.*%s)? ?[\"']?(chosen|rejected|text|messages|" + "|".join(PROMPTS + RESPONSES + RANKED)
           + r")[\"']?\s*(%s|$)")  # column names, at least one of which we know
FORMATS = [  # name, what the file begins with, code; an Excel file is a zip file as well
    ("a parquet file", "PAR1", PANDAS.format("read_parquet", "pyarrow")),
    ("an Excel file", r"PK\x03\x04.{26}(\[Con|xl/|_rels|docP)", PANDAS.format("read_excel", "openpyxl")),
    ("a zip file", r"PK\x03\x04", UNPACK.format("(z := zipfile.ZipFile(FILE)).open(z.namelist()[0])")),
    ("a zstd file", r"\x28\xb5\x2f\xfd", UNPACK.format("zstandard.open(FILE)") + "  # pip install zstandard"),
    ("an xz file", "\xfd7zXZ", UNPACK.format("lzma.open(FILE)")),
    ("a bzip2 file", r"BZh\d", UNPACK.format("bz2.open(FILE)")),
    ("a gzip file without .gz in its name", "\x1f\x8b", UNPACK.format("gzip.open(FILE)")),
    ("text in UTF-16", "\xff\xfe|\xfe\xff", UNPACK.format("codecs.EncodedFile(open(FILE, 'rb'), 'utf-8', 'utf-16')")),
    ("a JSON array", r"\s*\[\s*(\{|$)", WRITE.format("r", "r in json.load(OPEN(FILE, 'rb'))")),
    ("JSON with several lines for a row", r"\s*\{\s*$", WRITE.format("r", SEVERAL_LINES)),
    *((name, COLUMNS % (sep, sep), WRITE.format("r", f"r in csv.DictReader({TEXT}, delimiter={sep!r})"))
      for name, sep in (("a TSV file", "\t"), ("a CSV file with semicolons", ";"), ("a CSV file", ",")))]
MODULES = "bz2", "codecs", "csv", "gzip", "itertools", "json", "lzma", "pandas", "shutil", "zipfile", "zstandard"


def refuse_other_format(path, raw):
    """Raises DataError if the file's name or its first line `raw`, which is not a row, shows another format."""
    named = {".csv": "a CSV file", ".tsv": "a TSV file"}.get(Path(str(path).removesuffix(".gz")).suffix)
    for name, start, code in FORMATS:
        if name == named or re.match(start, raw.decode("latin-1")):
            raise DataError(f"{path}: this is {name}, but each line must be a JSON object{how_to_convert(path, code)}")


def how_to_convert(path, code):
    """The end of a message: the code for this path. The new file is never the old one."""
    names = {"FILE": repr(str(path)), "NEW": repr(str(Path(path).with_suffix(".rows.jsonl"))),
             "OPEN": "gzip.open" if str(path).endswith(".gz") else "open"}
    code = re.sub("|".join(names), lambda name: names[name[0]], code)
    modules = ", ".join(name for name in MODULES if re.search(rf"\b{name}\.\w+\(", code))
    return f". Two lines of Python convert it, then give --data={names['NEW']}:\n    import {modules}\n    {code}"


def missing(row, key):
    """The BadRow that says: the row has no `key`, and what it has instead."""
    shape, code = other_shape(row)
    if code is None or key == "chosen" and "'chosen'" not in code:
        shape, code = "the row has " + (", ".join(json.dumps(key[:30]) for key in [*row][:6]) or "no keys"), None
    return BadRow(f'missing key "{key}" ({shape})', code)


def other_shape(row):
    """(name, code) of a row that has the same texts under other keys than ours; code is None for an unknown shape."""
    def code(loop="", **texts):
        return WRITE.format("{" + ", ".join(f"{key!r}: {text}" for key, text in texts.items()) + "}", ROWS + loop)

    prompt, response, ranked = (next((key for key in keys if isinstance(row.get(key), kind) and row[key] != []), None)
                                for keys, kind in ((PROMPTS, str), (RESPONSES, str), (RANKED, list)))
    text = f"r[{prompt!r}]" + (" + '\\n'" if prompt != "prompt" else "")
    if prompt not in (None, "prompt") and {"chosen", "rejected"} <= set(row):
        return f'a pair with "{prompt}"', code(prompt=text, chosen="r['chosen']", rejected="r['rejected']")
    if prompt and ranked:
        order, scored = scored_answers(row, ranked)
        return (f'a ranking with "{prompt}" and "{ranked}", {order} first', code(prompt=text, chosen="b", rejected="a",
                loop=f" for (s, a), (t, b) in itertools.combinations(sorted({scored}), 2) if s < t"))
    if prompt and response:
        if "instruction" in row and "input" in row:
            text = "f\"{r['instruction']}\\n{r['input'] or ''}\".strip() + '\\n'"
        kind = {"output": "an Alpaca row", "completion": "a completion row"}.get(response, "a demonstration")
        return f'{kind} with "{prompt}" and "{response}"', code(prompt=text, response=f"r[{response!r}]")
    return "", None


def scored_answers(row, key):
    """(what comes first in a ranking, code for its pairs (score, answer)). A better answer has a higher score."""
    answer, nested = row[key][0], isinstance(row[key][0], dict)
    fields = answer if nested else {name: value[0] for name, value in row.items() if isinstance(value, list) and value}
    score = next((name for name, value in fields.items() if type(value) in (int, float)), None)
    text = next((name for name, value in fields.items() if isinstance(value, str)), None)
    a = f"a[{text!r}]" if nested else "a"
    if score is None:
        return "the best", f"((-i, {a}) for i, a in enumerate(r[{key!r}]))"
    sign, order = ("-", "the lowest") if "rank" in score else ("", "the highest")
    pair = f"{sign}a[{score!r}], {a}" if nested else f"{sign}s, a"
    each = f"a in r[{key!r}]" if nested else f"s, a in zip(r[{score!r}], r[{key!r}])"
    return f'{order} "{score}"', f"(({pair}) for {each})"


# ---------------------------------------------------------------------------------------------------------------------
# records

class Prompt(list):
    """Ids of a prompt. `row` is the file's dict for a reward function that takes rows, or None if none does."""
    __slots__ = ("row",)

    def __init__(self, ids, row=None):
        super().__init__(ids)
        self.row = row


@dataclass(frozen=True, slots=True)
class Demonstration:
    """Ids of a prompt, never empty, and of a response that ends with EOS."""
    prompt: list[int]
    response: list[int]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Ids of a prompt and of K responses, each ending with EOS, and pairs (chosen, rejected) of indices."""
    prompt: list[int]
    responses: list[list[int]]
    pairs: list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Split:
    """Records to train on, records held out (maybe none), and what became of the rows, as lines to print."""
    train: list
    heldout: list
    report: list[str]

    def examples(self, n):
        """At most n records, spread over those held out, or over those to train on if none are held out."""
        rows = self.heldout or self.train
        return rows[::max(1, len(rows) // n)][:n]


def spread(rows, n):
    """n of the rows at even distances, or all of them if there are no more."""
    return [rows[i * len(rows) // n] for i in range(n)] if n < len(rows) else list(rows)


def encode_row_prompt(encoding, prompt, chat):
    """Ids of a Row's prompt: a text unchanged, messages as `chat` renders them."""
    if isinstance(prompt, str):
        return encode_prompt(encoding, prompt)
    return render_messages(encoding, [{"role": role, "content": content} for role, content in prompt], chat)


def load_demonstrations(data, encoding, block_size, skip_bad=False, seed=0, n=10_000, chat="none"):
    """Split of Demonstrations. From "atlas": n drawn with `seed`, and right answers to the held-out
    questions. From a file: its responses, the chosen ones if it holds pairs. Raises DataError."""
    def record(row):
        prompt = encode_row_prompt(encoding, row.prompt, chat)
        response = encode_response(encoding, row.responses[0])
        check_length(len(prompt) + len(response), block_size)
        return Demonstration(prompt, response)

    if data != "atlas":
        return load_file(data, 1, skip_bad, record, chat)
    rng = np.random.default_rng(seed)
    train = [Row(prompt, (response,)) for prompt, response in atlas.demonstrations(n, rng)]
    heldout = [Row(prompt, (atlas.answer(prompt, "right", rng),)) for prompt in atlas.prompts("heldout")]
    return make_split(data, train, heldout, [], record)


def load_comparisons(data, encoding, block_size, skip_bad=False, chat="none"):
    """Split of Comparisons with one pair each, from a file of pairs or transcripts. Raises DataError, also
    for "atlas", where samples of the SFT policy are compared."""
    def record(row):
        if row.responses[0] == row.responses[1]:
            raise Unusable("chosen equal to rejected")
        prompt = encode_row_prompt(encoding, row.prompt, chat)
        responses = [encode_response(encoding, response) for response in row.responses]
        check_length(len(prompt) + max(map(len, responses)), block_size)
        return Comparison(prompt, responses, [(0, 1)])

    if data == "atlas":
        raise DataError("atlas stores no comparisons: let train_rm.py make them, or give a file of pairs")
    return load_file(data, 2, skip_bad, record, chat)


def load_prompts(data, encoding, block_size, max_new_tokens, skip_bad=False, rows_for=(), chat="none"):
    """Split of Prompts from "atlas" or a file with any kind of rows but {"text"}. A prompt must leave room for
    max_new_tokens and for the EOS that a cut answer is given before the reward model reads it.

    rows_for: the sides ("train", "heldout") whose Prompts carry their row. There each row is a separate task, and only
    a duplicate row is dropped: two rows with the same prompt may have different right answers. On the other sides each
    prompt is kept once. Raises DataError."""
    seen = set()

    def record(row):
        if not row.has_prompt:
            raise Unusable('a "text" without a "prompt"')
        prompt = encode_row_prompt(encoding, row.prompt, chat)
        check_length(len(prompt) + max_new_tokens + 1, block_size, f"with max_new_tokens={max_new_tokens} and an EOS ")
        key = row.prompt if row.source is None else \
            hashlib.sha256(json.dumps(row.source, sort_keys=True).encode()).digest()
        if key in seen:
            raise Unusable(f"the same {'prompt' if row.source is None else 'row'} again")
        seen.add(key)
        return Prompt(prompt, row.source)

    if data != "atlas":
        return load_file(data, 0, skip_bad, record, chat, rows_for)
    train, heldout = ([Row(prompt, source={"prompt": prompt} if side in rows_for else None)
                       for prompt in atlas.prompts(side)] for side in ("train", "heldout"))
    return make_split(data, train, heldout, [], record)


def default_max_new_tokens(data, encoding, block_size, skip_bad=False, chat="none"):
    """How long an answer may be, in tokens with EOS: 16 for "atlas". For a file it is the 95 % quantile of its
    responses, or 64 if it has none, but at most half of block_size. Raises DataError."""
    if data == "atlas":
        return 16
    rows = [row.responses for row in read_rows(data, skip_bad, lambda row: to_row(row, 0, chat))[0]
            if row.has_prompt and row.responses]
    step = math.ceil(len(rows) * max(map(len, rows), default=0) / 10_000) or 1  # encodes at most 10,000, evenly spread
    lengths = [len(encode_response(encoding, response)) for responses in rows[::step] for response in responses]
    longest = math.ceil(np.quantile(lengths, 0.95)) if lengths else 64
    return max(1, min(longest, block_size // 2))


def check_length(length, block_size, what=""):
    if length > block_size:
        raise Unusable(f"{what}longer than block_size={block_size}")


def load_file(path, n_responses, skip_bad, record, chat, rows_for=()):
    """Splits the rows of a file before any is dropped, so that the stages hold out the same rows. The sides in
    rows_for keep each row's dict from the file."""
    def convert(source):
        row = to_row(source, n_responses, chat)
        return row._replace(source=source) if rows_for else row

    rows, bad = read_rows(path, skip_bad, convert)
    train, heldout = split_rows(rows)
    if rows_for and "train" not in rows_for:
        train = [row._replace(source=None) for row in train]
    split = make_split(path, train, heldout, bad, record)
    split.report.extend(shared_mistakes([row for row in rows if isinstance(row.prompt, str)]))
    return split


def make_split(data, train_rows, heldout_rows, bad, record):
    """Rows -> Split; record: Row -> record, or Unusable. Raises DataError if no record is left to train on."""
    dropped = Counter()

    def records(rows):
        for row in rows:
            try:
                if row.problem:
                    raise Unusable(row.problem)
                yield record(row)
            except Unusable as reason:
                dropped[str(reason)] += 1
            except NoToken:
                dropped["a character that the tokenizer has no token for"] += 1

    train, heldout = list(records(train_rows)), list(records(heldout_rows))
    losses = [f"dropped {count:,}: {reason}" for reason, count in sorted(dropped.items())]
    if bad:
        losses.append(f"skipped {len(bad):,} bad, the first being {bad[0]}")
    if not train:
        advice = [what for word, what in (("block_size", "raise --block_size"), ('"prompt"', 'give rows with "prompt"'))
                  if any(word in reason for reason in dropped)]
        raise DataError("; ".join([f"0 usable rows in {data} to train on", *losses, *advice]))
    return Split(train, heldout, [f"train: {len(train):,} rows, held out: {len(heldout):,}", *losses])


# ---------------------------------------------------------------------------------------------------------------------
# mistakes that the rows of a file share; no single row shows them

NEARLY_ALL, FEWEST_ROWS = 0.9, 10
LETTER = r"[^\W\d_\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u9fff]"  # of a script that puts spaces between words
SHARED_MISTAKES = [(what, re.compile(pattern), advice) for what, pattern, advice in (
    # patterns of a prompt, \x00, and (if there is one) a response and \x01; none may take quadratic time
    ("a token's name, which is ordinary text here", r"<[|｜][^\s<>|｜]{1,30}[|｜]>|</?s>|\[/?INST\]|<</?SYS>>|"
     r"<(?:bos|eos|pad|(?:start|end)_of_turn)>|\[(?:BOS|EOS|PAD|CLS|SEP)\]", "remove it, each response gets its EOS"),
    ("no space between prompt and response", rf"(?<={LETTER}|[.,:;?!)])\x00{LETTER}", "begin responses with a space"),
    ("a space at the end of the prompt", r" \x00", "move it to the beginning of each response"),
    ("a response that repeats its prompt", r"\A(?=\s*[^\s\x00])([^\x00]+)\x00\s?\1", "leave the prompt out of it"),
    (r"\n as two characters and no line break", r"\A(?=[^\n]*\Z).*?\\n", "make line breaks of them"),
    ("HTML", r"&(?:amp|lt|gt|quot|nbsp|#\d{1,6}|#x[0-9a-fA-F]{1,6});|<br ?/?>", "apply html.unescape, remove the tags"),
    ("garbled characters", "[ÃÂ][\x80-\xbf]|â€", "read the source as UTF-8"),
    ("a placeholder", r"\{\{? ?(?:%s|text) ?\}?\}" % "|".join(PROMPTS + RESPONSES), "fill it in"),
    ("an empty response", r"\x00\s*(?:nan|NaN|None|null|)\x01", "look at the column that it comes from"))]


def shared_mistakes(rows):
    """A sentence for each mistake that nearly every row shows. All rows are searched only for a mistake that nearly
    every row of a sample shows."""
    report, sample = [], rows[::len(rows) // 1000 or 1]
    for what, pattern, advice in SHARED_MISTAKES if len(rows) >= FEWEST_ROWS else []:
        count, first = count_nearly_all(pattern, sample) and count_nearly_all(pattern, rows) or (0, None)
        if count:
            shown = first.string[max(0, first.start() - 12):first.end() + 12].replace("\x00", "").strip("\x01")
            example = f", such as {shown!r}" if len(shown) <= 60 else ""
            report.append(f"warning: {count:,} of {len(rows):,} rows have {what}{example}: {advice}")
    return report


def count_nearly_all(pattern, rows):
    """(number of rows that match a pattern, its first match), or None as soon as too many rows do not match."""
    first, misses, allowed = None, 0, len(rows) - math.ceil(NEARLY_ALL * len(rows))
    for row in rows:
        texts = [f"{row.prompt}\x00{response}\x01" for response in row.responses] or [row.prompt + "\x00"]
        found = next(filter(None, map(pattern.search, texts)), None)
        first, misses = first or found, misses + (not found)
        if misses > allowed:
            return None
    return len(rows) - misses, first


# ---------------------------------------------------------------------------------------------------------------------
# batches: B rows of T tokens, prompt and response together

def pad(rows, pad_id, width=None):
    """Lists of ids -> tokens (B, T) padded on the right, lens (B,), both int64. T is `width`, or else the length
    of the longest row. Raises ValueError if `width` would cut a row."""
    lens = torch.tensor([len(row) for row in rows], dtype=torch.long)
    longest = max(map(len, rows), default=0)
    if width is not None and width < longest:
        raise ValueError(f"width={width} would cut a row of {longest} tokens")
    tokens = torch.full((len(rows), longest if width is None else width), pad_id, dtype=torch.long)
    for padded, row in zip(tokens, rows):
        padded[: len(row)] = torch.tensor(row, dtype=torch.long)
    return tokens, lens


def collate_demonstrations(batch, pad_id):
    """Demonstrations -> tokens (B, T), prompt_lens (B,), response_lens (B,), mask (B, R), where R is the
    longest response and mask is True on response tokens up to and including EOS."""
    tokens, lens = pad([record.prompt + record.response for record in batch], pad_id)
    response_lens = torch.tensor([len(record.response) for record in batch], dtype=torch.long)
    mask = torch.arange(int(response_lens.max())) < response_lens[:, None]
    return tokens, lens - response_lens, response_lens, mask


def collate_comparisons(batch, pad_id, multiple=1):
    """Comparisons -> tokens (B, T), lens (N,), rows (N,), positions (B, T), texts (B, T), chosen (M,), rejected (M,),
    where T is a multiple of `multiple`.

    A row is a prompt and all its responses, one after the other, so the prompt is read once. The first five are what
    RewardModel.forward takes: the n-th of the N responses ends before lens[n] in row rows[n]; positions continue the
    prompt's in each response; texts is 0 on the prompt, n + 1 on a response, -1 on padding. The M pairs are indices of
    responses, so each response is read once, however often it was compared."""
    tokens, positions, texts, ends, chosen, rejected = [], [], [], [], [], []
    for row, record in enumerate(batch):
        chosen += [len(ends) + better for better, _ in record.pairs]
        rejected += [len(ends) + worse for _, worse in record.pairs]
        start = len(record.prompt)
        packed, where, text = list(record.prompt), list(range(start)), [0] * start
        for response in record.responses:
            packed += response
            where += range(start, start + len(response))
            text += [len(ends) + 1] * len(response)
            ends.append((len(packed), row))
        tokens, positions, texts = tokens + [packed], positions + [where], texts + [text]
    columns = (*zip(*ends), chosen, rejected)
    lens, rows, chosen, rejected = (torch.tensor(column, dtype=torch.long) for column in columns)
    T = -(-max(map(len, tokens)) // multiple) * multiple
    tokens, positions, texts = (pad(*column, T)[0] for column in ((tokens, pad_id), (positions, 0), (texts, -1)))
    return tokens, lens, rows, positions, texts, chosen, rejected


def collate_prompts(prompts, pad_id):
    """Lists of ids -> prompts (B, P), prompt_lens (B,)."""
    return pad(prompts, pad_id)


def length_buckets(lens, rows, size):
    """[(indices, T)]: rows (indices into lens) sorted by length and cut into passes of `size`, each with its longest
    length T, a Python int. A pass over tokens[indices, :T] computes little padding. lens and rows are on the CPU, so
    that nothing waits for the device."""
    rows = rows[lens[rows].argsort(stable=True)]
    return [(i, int(lens[i].max())) for i in rows.split(size)]


class BatchOrder:
    """Which rows make up the batch of a step: a pure function of (seed, step), so resuming needs nothing else.

    The stream is one permutation of all rows after another, cut every batch_size rows even across their borders, so
    that every row is used equally often. With window > 1, each run of `window` batches is sorted by `lengths`
    (one number per row) before it is cut, which saves padding, and its batches are shuffled."""

    def __init__(self, lengths, batch_size, seed, window=1):
        if min(len(lengths), batch_size, window) < 1:
            raise ValueError(f"{len(lengths)} rows, {batch_size=}, {window=}: each must be at least 1")
        self.lengths, self.batch_size, self.seed, self.window = np.asarray(lengths), batch_size, seed, window
        self.cached = None, None

    def permutation(self, epoch):
        """The rows in the order of an epoch. The last one is cached, because most steps are asked for in order."""
        if self.cached[0] != epoch:
            self.cached = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.lengths))
        return self.cached[1]

    def order(self, step):
        """Row indices (batch_size,) of a step >= 0; steps may be asked for in any order."""
        run, batch = divmod(step, self.window)
        size = self.window * self.batch_size
        epochs, places = np.divmod(np.arange(run * size, (run + 1) * size), len(self.lengths))
        rows = np.concatenate([self.permutation(e)[places[epochs == e]] for e in np.unique(epochs)])
        if self.window == 1:
            return rows
        rows = rows[np.argsort(self.lengths[rows], kind="stable")].reshape(self.window, self.batch_size)
        return rows[np.random.default_rng([self.seed, run, 1]).permutation(self.window)[batch]]
