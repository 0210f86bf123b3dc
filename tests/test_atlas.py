"""Tests of atlas.py: the facts, the split, the answers and their judge, the labeller, the tokenizer."""
import collections
import itertools
import math
import os
import pathlib
import random
import re
import subprocess
import sys
import unicodedata

import numpy as np
import pytest

import atlas

TRAIN, HELDOUT = atlas.prompts("train"), atlas.prompts("heldout")
ALL = TRAIN + HELDOUT


# -----------------------------------------------------------------------------
# the facts

def test_world_size_and_layout():
    assert len(atlas.CITIES) >= 110 and len(atlas.COUNTRIES) >= 45
    assert set(atlas.CITIES.values()) == set(atlas.COUNTRIES)
    per_country = collections.Counter(atlas.CITIES.values())
    assert all(1 <= n <= 4 for n in per_country.values()), per_country


def test_nothing_in_the_table_is_written_twice():
    # CITIES is a dict and would swallow a duplicate, so count what is written.
    lines = atlas.WORLD.strip().splitlines()
    written = [city for line in lines for city in line.split(": ")[1].split(", ")]
    assert len(written) == len(set(written)) == len(atlas.CITIES)
    assert len(lines) == len(set(atlas.COUNTRIES))


def test_no_city_gives_its_country_away():
    for city, country in atlas.CITIES.items():
        assert country.removeprefix("the ") not in city


def test_names_are_clean_and_some_have_spaces_accents_hyphens_apostrophes():
    names = [*atlas.CITIES, *atlas.COUNTRIES]
    for name in names:
        assert name == name.strip() and "  " not in name and name == unicodedata.normalize("NFC", name)
        assert re.fullmatch(r"[^\W\d_]+(?:[ '-][^\W\d_]+)*", name), name
    assert {"São Paulo", "Kraków", "Rio de Janeiro", "Cluj-Napoca", "Xi'an"} <= set(names)
    assert sum(" " in name for name in names) >= 15 and sum(not name.isascii() for name in names) >= 8


# -----------------------------------------------------------------------------
# questions and their split

def test_split_is_disjoint_exhaustive_and_a_tenth():
    everything = {phrasing.format(city=city) for phrasing in atlas.PHRASINGS for city in atlas.CITIES}
    assert len(ALL) == len(set(ALL)) == len(everything) == len(atlas.CITIES) * len(atlas.PHRASINGS)
    assert set(ALL) == everything
    assert 0.09 < len(HELDOUT) / len(ALL) < 0.11


def test_every_city_and_every_phrasing_stays_mostly_in_train():
    train = set(TRAIN)
    for city in atlas.CITIES:
        assert sum(phrasing.format(city=city) in train for phrasing in atlas.PHRASINGS) >= 10
    for phrasing in atlas.PHRASINGS:
        kept = sum(phrasing.format(city=city) in train for city in atlas.CITIES)
        assert 0.85 < kept / len(atlas.CITIES) < 1


def test_prompts_returns_a_fresh_list_in_a_fixed_order():
    again = atlas.prompts("train")
    assert again == TRAIN and again is not TRAIN
    assert HELDOUT[:3] == ["Where is Shanghai?", atlas.PHRASINGS[10].format(city="Shanghai"),
                           "In which country is Beijing?"]  # the order of the table, then of PHRASINGS
    assert all(prompt == prompt.strip() for prompt in ALL)


@pytest.mark.parametrize("split", ["test", "", "Train", None])
def test_unknown_split_is_refused(split):
    with pytest.raises(ValueError, match="split must be"):
        atlas.prompts(split)


def test_city_of_every_prompt():
    for phrasing in atlas.PHRASINGS:
        assert phrasing.count("{city}") == 1
        for city in atlas.CITIES:
            assert atlas.city_of(phrasing.format(city=city)) == city


@pytest.mark.parametrize("prompt", ["", "Oslo", "Where is Atlantis?", "Where is Oslo? ", "Where is Oslo"])
def test_a_prompt_that_is_no_question_is_refused(prompt):
    rng = np.random.default_rng(0)
    for call in (lambda: atlas.city_of(prompt), lambda: atlas.answer(prompt, "right", rng),
                 lambda: atlas.kind_of(prompt, " It is in China.")):
        with pytest.raises(ValueError, match="not an atlas question"):
            call()


# -----------------------------------------------------------------------------
# answers and their judge

@pytest.mark.parametrize("kind", atlas.KINDS)
def test_kind_of_inverts_answer_for_every_prompt(kind):
    rng = np.random.default_rng(1)
    for prompt in ALL:
        response = atlas.answer(prompt, kind, rng)
        assert atlas.kind_of(prompt, response) == kind, (prompt, response)
        assert atlas.is_right(prompt, response) == (kind == "right")
        assert response.startswith(" ") and not response.startswith("  ") and response.endswith(".")


def test_the_sentences_of_the_kinds_do_not_overlap():
    prompt, city = "Where is São Paulo?", "São Paulo"
    right = {form.format(city=city, country="Brazil") for form in atlas.STATEMENTS}
    wrong = {form.format(city=city, country=c) for form in atlas.STATEMENTS for c in atlas.COUNTRIES} - right
    nonsense = {form.format(city=city) for form in atlas.NONSENSE}
    known = {"right": right, "wrong": wrong, "nonsense": nonsense, "evasive": atlas.EVASIONS}
    for kind, sentences in known.items():
        assert {atlas.kind_of(prompt, sentence) for sentence in sentences} == {kind}


def test_scrambled_reorders_a_right_answer_or_lacks_a_word():
    # An unguarded shuffle of these four words is right about once in 24 tries.
    rng = np.random.default_rng(2)
    prompt = "Where is Shanghai?"
    expected = set()
    for form in atlas.STATEMENTS:
        words = form.format(city="Shanghai", country="China")[1:-1].split()
        expected |= {" " + " ".join(order) + "." for order in itertools.permutations(words) if list(order) != words}
        expected |= {" " + " ".join(words[:i] + words[i + 1:]) + "." for i in range(4)}
    seen = {atlas.answer(prompt, "scrambled", rng) for _ in range(10_000)}
    assert seen == expected
    assert not any(atlas.is_right(prompt, response) for response in seen)


def test_a_country_is_as_often_wrong_as_it_is_right_elsewhere():
    rng = np.random.default_rng(3)
    prompt, n = "Where is Shanghai?", 20_000
    answers = [atlas.answer(prompt, "wrong", rng) for _ in range(n)]
    countries = collections.Counter(re.search(r" in (.+)\.", answer)[1] for answer in answers)
    n -= countries.pop("China")  # the answers about a neighbour
    elsewhere = collections.Counter(country for country in atlas.CITIES.values() if country != "China")
    assert set(countries) == set(elsewhere)
    for country, cities in elsewhere.items():
        expected = n * cities / elsewhere.total()
        assert abs(countries[country] - expected) < 5 * math.sqrt(expected)


def test_a_quarter_of_wrong_answers_is_true_of_a_neighbour():
    """A neighbour is another city of the same country. A country with one city here has none."""
    rng, n = np.random.default_rng(4), 20_000
    answers = collections.Counter(atlas.answer("Where is Shanghai?", "wrong", rng) for _ in range(n))
    true_elsewhere = {f" {city} {verb} in China."
                      for city in ("Beijing", "Chengdu", "Xi'an") for verb in ("is", "lies")}
    assert {answer for answer in answers if "China" in answer} == true_elsewhere
    share = sum(answers[answer] for answer in true_elsewhere) / n
    assert abs(share - atlas.NEIGHBOUR_SHARE) < 5 * math.sqrt(0.25 * 0.75 / n)
    for answer in true_elsewhere:
        assert abs(answers[answer] - n / 24) < 5 * math.sqrt(n / 24)
    alone = [atlas.answer("Where is Budapest?", "wrong", rng) for _ in range(200)]  # Hungary has one city here
    assert all("Budapest" in answer or answer.startswith(" It is") for answer in alone)


@pytest.mark.parametrize("response", [
    " Shanghai is in China", "Shanghai is in China.", "  Shanghai is in China.", " Shanghai is in China. ",
    " Shanghai is in China.\n", " Shanghai is in China..", " Shanghai is in China!", " shanghai is in China.",
    " Shanghai is in China. It is in China.", " Shanghai is in China. Shanghai is in China.",
    " Shanghai is in the China.", " Shanghai is in Chin.", " Beijing is in China.", " Shanghai is in Peru.",
    " Shanghai  is in China.", " China.", "", " ", "\0", " Shanghai is in {country}.",
])
def test_is_right_rejects_near_misses(response):
    assert atlas.is_right("Where is Shanghai?", " Shanghai is in China.")
    assert not atlas.is_right("Where is Shanghai?", response)


@pytest.mark.parametrize("response, kind", [
    (" Paris is in France.", "wrong"), (" Beijing lies in China.", "wrong"), (" It is in France.", "wrong"),
    (" Paris is delicious.", "nonsense"), (" Paris is in Atlantis.", "scrambled"),
    (" Atlantis is in China.", "scrambled"), (" Shanghai is tasty.", "scrambled"), ("", "scrambled"),
    (" I do not know. I do not know.", "scrambled"), ("I do not know.", "scrambled"),
])
def test_answers_about_another_city_and_text_from_nowhere(response, kind):
    assert atlas.kind_of("Where is Shanghai?", response) == kind


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="kind must be one of right, wrong"):
        atlas.answer("Where is Shanghai?", "correct", np.random.default_rng(0))


# -----------------------------------------------------------------------------
# demonstrations and pairs

def test_demonstrations_cover_train_evenly_and_leave_heldout_alone():
    n = 2 * len(TRAIN) + 100
    demos = atlas.demonstrations(n, np.random.default_rng(4))
    counts = collections.Counter(prompt for prompt, _ in demos)
    assert len(demos) == n and set(counts) == set(TRAIN)
    assert collections.Counter(counts.values()) == {3: 100, 2: len(TRAIN) - 100}
    asked = [prompt for prompt, _ in demos]
    first, second = asked[:len(TRAIN)], asked[len(TRAIN):2 * len(TRAIN)]
    assert first != TRAIN and first != second and set(first) == set(second) == set(TRAIN)
    assert atlas.demonstrations(0, np.random.default_rng(4)) == []


def test_demonstrations_follow_the_mixture():
    n = 40_000
    demos = atlas.demonstrations(n, np.random.default_rng(5))
    counts = collections.Counter(atlas.kind_of(prompt, response) for prompt, response in demos)
    assert math.isclose(sum(atlas.DEMO_MIX.values()), 1)
    for kind, share in atlas.DEMO_MIX.items():
        z = (counts[kind] - n * share) / math.sqrt(n * share * (1 - share))
        assert abs(z) < 4, (kind, z)


def test_demonstrations_depend_on_the_generator_alone():
    same = [atlas.demonstrations(500, np.random.default_rng(6)) for _ in range(2)]
    assert same[0] == same[1] != atlas.demonstrations(500, np.random.default_rng(7))


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_country_pairs_differ_in_the_country_alone(split):
    pairs = atlas.country_pairs(split)
    assert [prompt for prompt, _, _ in pairs] == atlas.prompts(split) and pairs == atlas.country_pairs(split)
    wrong_countries = set()
    for prompt, right, wrong in pairs:
        assert atlas.is_right(prompt, right) and atlas.kind_of(prompt, wrong) == "wrong"
        country = " in " + atlas.CITIES[atlas.city_of(prompt)] + "."
        assert right.endswith(country)
        stem = right.removesuffix(country)
        assert wrong.startswith(stem + " in ") and wrong[len(stem + " in "):-1] in atlas.COUNTRIES
        wrong_countries.add(wrong[len(stem + " in "):-1])
    # With one fixed wrong country, knowing that country to be wrong would pass for knowing the facts.
    assert len(wrong_countries) >= 0.8 * len(atlas.COUNTRIES)


# -----------------------------------------------------------------------------
# the simulated labeller

ONE_OF_EACH = {"right": " Lima is in Peru.", "wrong": " Lima is in China.", "nonsense": " Lima is asleep.",
               "evasive": " I do not know.", "scrambled": " Lima Peru in is."}


def test_preference_is_the_sigmoid_of_the_utility_gap():
    prompt = "Where is Lima?"
    assert set(atlas.UTILITY) == set(atlas.KINDS) == set(ONE_OF_EACH)
    for kind_a, a in ONE_OF_EACH.items():
        assert atlas.utility(prompt, a) == atlas.UTILITY[kind_a]
        for kind_b, b in ONE_OF_EACH.items():
            gap = atlas.UTILITY[kind_a] - atlas.UTILITY[kind_b]
            p = atlas.preference(prompt, a, b)
            assert p == pytest.approx(math.exp(gap) / (1 + math.exp(gap)), rel=1e-12)
            assert p + atlas.preference(prompt, b, a) == pytest.approx(1, abs=1e-15)


def test_judge_is_the_share_of_right_answers_and_the_mean_utility():
    """Right 3, wrong -1, evasive 0 and scrambled -3: one in four right, a mean of -1/4."""
    question = "Where is Shanghai?"
    answers = [" It is in China.", " It is in Peru.", " I do not know.", " is China."]
    assert atlas.evaluate([(question, answer) for answer in answers]) == {"gold": 0.25, "utility": -0.25}


def test_label_is_a_draw_of_preference():
    prompt, n = "Where is Lima?", 20_000
    rng = np.random.default_rng(8)
    for kind_a, kind_b in ("evasive", "wrong"), ("nonsense", "wrong"), ("right", "right"), ("right", "wrong"):
        a, b = ONE_OF_EACH[kind_a], ONE_OF_EACH[kind_b]
        p = atlas.preference(prompt, a, b)
        labels = [atlas.label(prompt, a, b, rng) for _ in range(n)]
        assert set(map(type, labels)) == {bool}
        assert abs(sum(labels) - n * p) < 4 * math.sqrt(n * p * (1 - p)), (kind_a, kind_b)


def test_labels_depend_on_the_generator_alone():
    def draw(seed):
        rng = np.random.default_rng(seed)
        a, b = ONE_OF_EACH["evasive"], ONE_OF_EACH["wrong"]
        return [atlas.label("Where is Lima?", a, b, rng) for _ in range(100)]
    assert draw(9) == draw(9) != draw(10)


def test_label_entropy_values_and_edges():
    entropy = atlas.label_entropy(np.array([0.0, 1.0, 0.5, 0.25]))
    assert entropy[0] == 0 and entropy[1] == 0
    assert entropy[2] == pytest.approx(math.log(2), rel=1e-15)
    assert entropy[3] == pytest.approx(0.25 * math.log(4) + 0.75 * math.log(4 / 3), rel=1e-15)
    assert atlas.label_entropy(np.zeros((2, 3))).shape == (2, 3)
    assert np.isfinite(atlas.label_entropy(np.array([1e-320, 1 - 1e-16]))).all()
    for bad in (-1e-9, 1.5, math.nan):
        with pytest.raises(ValueError, match="outside"):
            atlas.label_entropy(np.array([0.5, bad]))


def test_label_entropy_is_the_lowest_bradley_terry_loss():
    # The expected loss of a model that says q where the labeller means p is least at q = p.
    p = atlas.preference("Where is Lima?", " I do not know.", " Lima is in China.")
    q = np.linspace(0.01, 0.99, 9801)
    loss = -p * np.log(q) - (1 - p) * np.log(1 - q)
    assert q[loss.argmin()] == pytest.approx(p, abs=1e-4)
    assert loss.min() == pytest.approx(atlas.label_entropy(p), abs=1e-8)


# -----------------------------------------------------------------------------
# the tokenizer

def pieces(text):
    """What the tokens of a text should be: each word with the space before it, each punctuation mark."""
    return re.findall(r" ?[^\s.?]+|[.?]", text)


def token_strings(text):
    encoding = atlas.tokenizer()
    return [encoding.decode([i]) for i in encoding.encode_ordinary(text)]


def test_every_prompt_and_answer_is_one_token_per_word():
    rng = np.random.default_rng(11)
    for prompt in ALL:
        for kind in atlas.KINDS:
            response = atlas.answer(prompt, kind, rng)
            assert token_strings(prompt) == pieces(prompt)
            assert token_strings(response) == pieces(response)
            assert token_strings(prompt + response) == pieces(prompt) + pieces(response)


def test_every_statement_is_one_token_per_word():
    for city in atlas.CITIES:
        for form in (*atlas.STATEMENTS, *atlas.NONSENSE):
            text = form.format(city=city, country="the Netherlands")
            assert token_strings(text) == pieces(text)
    for country in atlas.COUNTRIES:
        assert token_strings(f" It is in {country}.") == pieces(f" It is in {country}.")
    assert [len(pieces(text)) for text in (" It is in Peru.", " São Paulo is in Brazil.")] == [5, 6]


def test_ids_are_dense_and_eot_is_the_last():
    encoding = atlas.tokenizer()
    assert encoding.name == "atlas" and encoding.eot_token == encoding.n_vocab - 1
    tokens = [encoding.decode_single_token_bytes(i) for i in range(encoding.n_vocab)]
    assert tokens[:256] == [bytes([i]) for i in range(256)]
    assert tokens[256:-1] == sorted(tokens[256:-1]) and len(set(tokens)) == encoding.n_vocab
    assert tokens[-1] == b"<|endoftext|>"
    assert atlas.tokenizer() is encoding


NASTY = [
    "", " ", "    ", " " * 1000, "\t", "\n", "\r\n", " \n ", "\n\n\nWhere is\tShanghai?\r\n",
    "\0", "a\0b", "\x7f\x1b[0m", "<|endoftext|>", "Where is <|endoftext|>?",
    "🙂", "👩\u200d👩\u200d👧", "🇳🇱🏳\ufe0f\u200d🌈", "上海在哪里？", "東京 京都", "서울", "العربية", "हिन्दी",
    "Sa\u0303o Paulo", "\u0301", " \u0301\u0302", "a\u200db", "\u200b\ufeff",
    "\u00a0Shanghai", "\u2028\u2029\u0085",
    "it's", "Xi'an's", "rock'n'roll-", "--''--", "-Shanghai", "Shanghai-", "12345 3.14", "snake_case",
    "ǅ ﬁ ß İ", "ª º ²", "\U0010ffff\ufffe", "  Shanghai  is  in  China.  ", "WhereWhereWhere inin",
    " is" * 500, "x" * 3000,
]


@pytest.mark.parametrize("text", NASTY)
def test_round_trip_of_nasty_text(text):
    encoding = atlas.tokenizer()
    ids = encoding.encode_ordinary(text)
    assert encoding.decode(ids) == text
    assert encoding.eot_token not in ids
    assert len(ids) <= len(text.encode())


def test_round_trip_of_random_unicode():
    encoding, rng = atlas.tokenizer(), random.Random(12)
    ranges = [(0, 0x80), (0x80, 0x250), (0x300, 0x370), (0x2000, 0x2070), (0x4E00, 0x5000),
              (0x1F300, 0x1F650), (0, 0xD800), (0xE000, 0x110000)]  # all but the surrogates
    for _ in range(3000):
        text = "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(40)))
        assert encoding.decode(encoding.encode_ordinary(text)) == text, ascii(text)


def test_ids_do_not_depend_on_the_hash_seed():
    # Sets of strings iterate in an order that PYTHONHASHSEED moves; checkpoints need ids that stay.
    script = "import atlas; print(atlas.tokenizer()._mergeable_ranks, atlas.prompts('heldout'))"
    root = pathlib.Path(atlas.__file__).parent
    outputs = set()
    for seed in ("1", "2", "3"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONIOENCODING": "utf-8"}
        outputs.add(subprocess.check_output([sys.executable, "-c", script], cwd=root, env=environment))
    assert len(outputs) == 1 and b"Shanghai" in outputs.pop()
