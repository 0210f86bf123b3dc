"""
The built-in task: a small world where every answer can be judged.

    Where is Shanghai?   ->   " Shanghai is in China."       right
                              " Shanghai is in Peru."        wrong
                              " Shanghai is delicious."      nonsense
                              " I do not know."              evasive
                              " in Shanghai China is."       scrambled

This file holds the facts, the questions, the answers, the simulated labeller who compares answers, and
the tokenizer. The labeller prefers answers by a hidden utility. Only its comparisons may reach training;
the utility itself and `is_right` exist only to measure the result.

It is not a benchmark of knowledge. It is a world small enough for a laptop, in which the truth that a reward
model can only estimate is known exactly.
"""
import functools
import math
import re

import numpy as np
import tiktoken

# -----------------------------------------------------------------------------
# the facts

# A country is written as it appears after "in". Each city is the best-known one of its name. No name of a city
# contains that of its country, and no city's location is disputed. Append new lines at the end: the split below
# counts cities in this order.
WORLD = """
China: Shanghai, Beijing, Chengdu, Xi'an
Japan: Tokyo, Osaka, Kyoto
South Korea: Seoul, Busan
Vietnam: Hanoi, Ho Chi Minh City
Thailand: Bangkok, Chiang Mai
Malaysia: Kuala Lumpur
Indonesia: Jakarta, Surabaya
the Philippines: Manila
India: New Delhi, Mumbai, Kolkata
Pakistan: Karachi, Lahore
Iran: Tehran, Isfahan
Nepal: Kathmandu, Pokhara
Turkey: Istanbul, Ankara
Greece: Athens, Thessaloniki
Romania: Bucharest, Cluj-Napoca
Hungary: Budapest
Poland: Warsaw, Kraków, Gdańsk
Austria: Vienna, Salzburg
Switzerland: Zürich, Geneva, Basel
Germany: Berlin, Hamburg, Munich, Cologne
Italy: Rome, Milan, Venice
France: Paris, Lyon, Marseille, Bordeaux
Spain: Madrid, Barcelona, Seville
Portugal: Lisbon, Porto
Belgium: Brussels, Antwerp
the Netherlands: Amsterdam, Rotterdam, Utrecht
the United Kingdom: London, Edinburgh, Glasgow, Liverpool
Ireland: Dublin, Galway
Iceland: Reykjavík
Norway: Oslo, Bergen, Tromsø
Sweden: Stockholm, Gothenburg, Malmö
Denmark: Copenhagen, Aarhus
Finland: Helsinki, Tampere
Morocco: Casablanca, Marrakesh
Egypt: Cairo, Luxor
Ghana: Accra, Kumasi
Nigeria: Lagos, Ibadan
Ethiopia: Addis Ababa
Kenya: Nairobi, Mombasa
Tanzania: Dar es Salaam
South Africa: Cape Town, Johannesburg, Durban
Canada: Toronto, Montréal, Vancouver
the United States: New York, Los Angeles, Chicago, Seattle
Mexico: Monterrey, Tijuana
Colombia: Bogotá, Medellín
Peru: Lima, Cusco
Brazil: São Paulo, Rio de Janeiro, Brasília
Argentina: Buenos Aires, Mendoza
Australia: Sydney, Melbourne, Brisbane
New Zealand: Auckland, Wellington
"""
_LINES = [line.split(": ") for line in WORLD.strip().splitlines()]
CITIES = {city: country for country, cities in _LINES for city in cities.split(", ")}
COUNTRIES = tuple(country for country, _ in _LINES)

# -----------------------------------------------------------------------------
# questions

PHRASINGS = (
    "Where is {city}?",
    "In which country is {city}?",
    "Tell me where {city} is.",
    "Which country is {city} in?",
    "Where can I find {city}?",
    "Do you know where {city} is?",
    "What country is {city} in?",
    "Name the country that {city} is in.",
    "Where in the world is {city}?",
    "To which country does {city} belong?",
    "I am looking for {city}. Where is it?",
    "Please tell me which country {city} is in.",
)
_CITY_OF = {phrasing.format(city=city): city for city in CITIES for phrasing in PHRASINGS}


def city_of(prompt: str) -> str:
    """Return the city that a prompt asks about. Raises ValueError if the prompt is not an atlas question."""
    if prompt not in _CITY_OF:
        raise ValueError(f"{prompt!r} is not an atlas question; atlas.prompts() lists them")
    return _CITY_OF[prompt]


def prompts(split: str) -> list[str]:
    """
    Return the questions of a split, "train" or "heldout", in a fixed order. Raises ValueError otherwise.

    About one question in ten is held out. Training never shows its phrasing with its city, but it shows the
    city with at least ten of the twelve phrasings, and the phrasing with about nine cities in ten.
    The split is the same for all runs, whatever their seed, so that they stay comparable.
    """
    if split not in ("train", "heldout"):
        raise ValueError(f'split must be "train" or "heldout", got {split!r}')
    return [phrasing.format(city=city)
            for c, city in enumerate(CITIES) for p, phrasing in enumerate(PHRASINGS)
            if ((c - p) % 10 == 0) == (split == "heldout")]


# -----------------------------------------------------------------------------
# answers; each starts with a space, so that prompt + response is plain text

STATEMENTS = (" {city} is in {country}.", " It is in {country}.", " {city} lies in {country}.")
NONSENSE = tuple(" {city} is " + what + "." for what in (
    "delicious", "purple", "asleep", "made of cheese", "under my bed", "a kind of soup", "on the moon",
    "seven years old", "inside a teapot", "a prime number", "too loud to eat", "my left shoe"))
EVASIONS = (" I do not know.", " That is hard to say.", " I would rather not say.")
DEMO_MIX = {"right": 0.40, "wrong": 0.24, "nonsense": 0.10, "evasive": 0.14, "scrambled": 0.12}
KINDS = tuple(DEMO_MIX)
# " Beijing is in China." about Shanghai. A policy that confuses neighbours gives such answers, and a reward model that
# rarely saw them would judge by the country alone.
NEIGHBOUR_SHARE = 0.25

_ALL_STATEMENTS = {form.format(city=a, country=b) for form in STATEMENTS for a in CITIES for b in COUNTRIES}
_ALL_NONSENSE = {form.format(city=city) for form in NONSENSE for city in CITIES}


def _pick(options, rng):
    return options[rng.integers(len(options))]


def answer(prompt: str, kind: str, rng: np.random.Generator) -> str:
    """
    Write one answer of a kind (one of KINDS) to a prompt, drawn uniformly from the sentences of that kind.
    Only a wrong country is not: it is the country of a random other city. NEIGHBOUR_SHARE of the wrong answers are
    true of another city in the same country. Half of the scrambled ones lack a word and are otherwise in order.
    Raises ValueError for another kind, or for a prompt that is not an atlas question.
    """
    city = city_of(prompt)
    if kind == "right":
        return _pick(STATEMENTS, rng).format(city=city, country=CITIES[city])
    if kind == "wrong":
        neighbours = [other for other, country in CITIES.items() if country == CITIES[city] and other != city]
        if neighbours and rng.random() < NEIGHBOUR_SHARE:
            form = _pick([form for form in STATEMENTS if "{city}" in form], rng)
            return form.format(city=_pick(neighbours, rng), country=CITIES[city])
        # Each country is as often wrong here as it is right elsewhere. Otherwise a reward model would learn that an
        # answer with China in it is mostly right, before it learned where any city is.
        others = [country for country in CITIES.values() if country != CITIES[city]]
        return _pick(STATEMENTS, rng).format(city=city, country=_pick(others, rng))
    if kind == "nonsense":
        return _pick(NONSENSE, rng).format(city=city)
    if kind == "evasive":
        return _pick(EVASIONS, rng)
    if kind == "scrambled":
        words = answer(prompt, "right", rng).removesuffix(".").split()
        if rng.random() < 0.5:
            del words[rng.integers(len(words))]
            return " " + " ".join(words) + "."
        shuffled = words
        while shuffled == words:  # a shuffle may leave the order as it was
            shuffled = [words[i] for i in rng.permutation(len(words))]
        return " " + " ".join(shuffled) + "."
    raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")


@functools.lru_cache(maxsize=2 ** 16)  # each answer is compared with all others to its question
def kind_of(prompt: str, response: str) -> str:
    """
    Return the kind (one of KINDS) of any response text, by exact comparison with the sentences above.

    A statement or nonsense sentence about a city that was not asked for is "wrong" or "nonsense", even if the
    statement is true. Any other text, the empty one included, is "scrambled".
    Raises ValueError for a prompt that is not an atlas question.
    """
    city = city_of(prompt)
    if response in [form.format(city=city, country=CITIES[city]) for form in STATEMENTS]:
        return "right"
    if response in _ALL_STATEMENTS:
        return "wrong"
    if response in _ALL_NONSENSE:
        return "nonsense"
    return "evasive" if response in EVASIONS else "scrambled"


def is_right(prompt: str, response: str) -> bool:
    """The gold check: does the response state the right country, and nothing else?"""
    return kind_of(prompt, response) == "right"


def demonstrations(n: int, rng: np.random.Generator) -> list[tuple[str, str]]:
    """
    Return n (prompt, response) pairs of the train split, the kinds of answer mixed as DEMO_MIX says.
    Prompts come in shuffled passes over the whole split, so all occur equally often, give or take one.
    """
    train = prompts("train")
    passes = [rng.permutation(len(train)) for _ in range(math.ceil(n / len(train)))]
    order = [train[i] for one_pass in passes for i in one_pass][:n]
    kinds = rng.choice(KINDS, size=n, p=list(DEMO_MIX.values()))
    return [(prompt, answer(prompt, kind, rng)) for prompt, kind in zip(order, kinds)]


def country_pairs(split: str) -> list[tuple[str, str, str]]:
    """
    Return one (prompt, right response, wrong response) per prompt of a split, always the same ones. The two
    responses differ in the country alone, so a model that prefers the first knows the fact.
    """
    pairs = []
    for i, prompt in enumerate(prompts(split)):
        city, form = city_of(prompt), STATEMENTS[i % len(STATEMENTS)]
        step = 1 + i % (len(COUNTRIES) - 1)  # never a full turn, so never back at the right country
        wrong = COUNTRIES[(COUNTRIES.index(CITIES[city]) + step) % len(COUNTRIES)]
        right_and_wrong = (form.format(city=city, country=country) for country in (CITIES[city], wrong))
        pairs.append((prompt, *right_and_wrong))
    return pairs


# -----------------------------------------------------------------------------
# the simulated labeller

UTILITY = {"right": 3.0, "evasive": 0.0, "wrong": -1.0, "nonsense": -2.0, "scrambled": -3.0}


def utility(prompt: str, response: str) -> float:
    """Return the hidden utility of a response. For measuring and for the labeller, never for training."""
    return UTILITY[kind_of(prompt, response)]


def evaluate(pairs: list[tuple[str, str]]) -> dict[str, float]:
    """Return {"gold": share of right answers, "utility": mean hidden utility} of (prompt, response) pairs."""
    return {"gold": sum(is_right(*pair) for pair in pairs) / len(pairs),
            "utility": sum(utility(*pair) for pair in pairs) / len(pairs)}


def preference(prompt: str, a: str, b: str) -> float:
    """Return the probability that the labeller prefers response a to b: Bradley-Terry, sigmoid(u_a - u_b)."""
    return 1 / (1 + math.exp(utility(prompt, b) - utility(prompt, a)))


def label(prompt: str, a: str, b: str, rng: np.random.Generator) -> bool:
    """Ask the labeller once. True: a is preferred. Asked again, the labeller may say otherwise."""
    return bool(rng.random() < preference(prompt, a, b))


def label_entropy(p: np.ndarray) -> np.ndarray:
    """
    Return the entropy in nats of labels that come out True with probability p, elementwise; 0 at p = 0 and 1.

    Its mean over pairs, with p from `preference`, is the lowest Bradley-Terry loss that any reward model can
    expect on them: what remains is the labeller's own noise. Raises ValueError if a p is outside [0, 1].
    """
    p = np.asarray(p, dtype=np.float64)
    if not np.all((p >= 0) & (p <= 1)):
        raise ValueError("label_entropy takes probabilities, but a value lies outside [0, 1]")
    return sum(-q * np.log(np.where(q > 0, q, 1.0)) for q in (p, 1 - p))  # 0 log 0 counts as 0


# -----------------------------------------------------------------------------
# the tokenizer

# A word with the space before it and with the hyphens and apostrophes inside it; otherwise one character. Every
# character is part of one or the other, so no text is lost.
_PATTERN = r" ?[\p{L}\p{M}]+(?:['-][\p{L}\p{M}]+)*|\s|[^\s\p{L}\p{M}]"


@functools.lru_cache
def tokenizer() -> tiktoken.Encoding:
    """
    Return the encoding "atlas": one token for each word that a question or an answer can contain, and
    single bytes for all other text, punctuation included. `eot_token` is the last id. Needs no network.
    """
    texts = [*_CITY_OF, *_ALL_STATEMENTS, *_ALL_NONSENSE, *EVASIONS]
    words = {word.encode() for text in texts for word in re.findall(r" ?[^\s.?]+", text)}
    single = [bytes([i]) for i in range(256)]
    # Sorted, because ids must not depend on set order. "I", the first word of a question, is already a byte.
    ranks = {piece: i for i, piece in enumerate(single + sorted(words.difference(single)))}
    return tiktoken.Encoding("atlas", pat_str=_PATTERN, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": len(ranks)}, explicit_n_vocab=len(ranks) + 1)
