"""
Tests of tools/inspect_rollout.py: its numbers are those of the loop, whatever a model emits can be seen and does no
harm, and the page works in a real browser, where there is one.
"""

import hashlib
import io
import json
import re
import shutil

import pytest
import torch

import train_ppo
import train_rm
import train_sft
from browser import CHROMIUM, Browser
from experiments import rungs
from ppo import explained_variance, masked_mean, whiten
from rollout import score_response
from support import flags
from support.checkpoint import load_checkpoint
from tools import inspect_rollout
from tools.inspect_rollout import Config, load_sides, measure, next_rollout

RUN = dict(device="cpu", batch_size=16, minibatches=2, epochs=2, lr=3e-3, max_new_tokens=6, save_interval=2)
SHANGHAI = "Where is Shanghai?"


# ----------------------------------------------------------------------------------------------------------
# a tiny run of the built-in task

@pytest.fixture(scope="module")
def stages(sft, tmp_path_factory):
    """A folder with sft.pt and rm.pt."""
    folder = tmp_path_factory.mktemp("inspect")
    shutil.copy(sft, folder)
    train_rm.train(train_rm.Config(out_dir=str(folder), device="cpu", max_iters=3, batch_size=4, candidates=3,
                                   max_new_tokens=6))
    return folder


def run_ppo(stages, folder, **flags):
    shutil.copytree(stages, folder, dirs_exist_ok=True)
    return rungs.train(rungs.Config(**RUN | {"out_dir": str(folder), "max_iters": 2} | flags))


@pytest.fixture(scope="module")
def trained(stages, tmp_path_factory):
    """A folder with sft.pt, rm.pt and a ppo.pt of two rollouts."""
    folder = tmp_path_factory.mktemp("inspect") / "run"
    run_ppo(stages, folder)
    return folder


def look(folder, name="ppo.pt", **flags):
    """(what the page shows, its only view or its views) for a checkpoint of a folder."""
    contents = inspect_rollout.inspect(Config(**{"checkpoint": str(folder / name), "device": "cpu", "completions": 0,
                                                 "updates": 0} | flags))
    return contents["views"] if "after" in flags else contents["views"][0]


def side_of(folder, name="ppo.pt", **flags):
    return load_sides(Config(checkpoint=str(folder / name), device="cpu", **flags))[0]


# ----------------------------------------------------------------------------------------------------------
# the numbers

@pytest.mark.parametrize("flags", [
    {}, {"critic": "shared"}, {"kl_in": "loss"}, {"objective": "reward_to_go", "minibatches": None, "epochs": 1},
    {"gamma": 0.9, "lam": 0.5, "temperature": 0.7, "eos_penalty": 2.0}], ids=str)
def test_the_next_rollout_has_the_numbers_of_train_ppo(flags, stages, tmp_path, monkeypatch):
    """The numbers are those that train_ppo.py has when it resumes from the checkpoint."""
    run_ppo(stages, tmp_path, **flags)
    side = side_of(tmp_path)
    numbers = measure(side, [], next_rollout(side))
    mask, B = numbers["mask"], len(numbers["scores"])

    kept = {}
    real = rungs.token_advantages
    monkeypatch.setattr(rungs, "token_advantages", lambda *args: kept.setdefault("result", real(*args)))
    row = rungs.train(rungs.Config(**RUN | {"out_dir": str(tmp_path), "max_iters": 3, "resume": True} | flags))
    advantages, _ = kept["result"]
    torch.testing.assert_close(numbers["advantage"], advantages, rtol=0, atol=1e-5)
    torch.testing.assert_close(numbers["whitened"], whiten(advantages, mask), rtol=0, atol=1e-4)
    for name, mine in (("score", numbers["scores"].mean()), ("reward", numbers["reward"].sum() / B),
                       ("kl", numbers["kl_sum"].mean()), ("entropy", masked_mean(numbers["entropy"], mask)),
                       ("eos_rate", numbers["has_eos"].float().mean()),
                       ("explained_variance", explained_variance(numbers["value"], numbers["reward_to_go"], mask))):
        assert mine.item() == pytest.approx(row[name], abs=1e-4), name
    assert abs(row["kl"]) > 1e-3  # the policy has left its reference, so a KL of 0 would be seen


def test_an_sft_checkpoint_is_seen_as_the_first_rollout_of_ppo_sees_it(stages, tmp_path):
    row = run_ppo(stages, tmp_path, max_iters=1)
    side, _ = load_sides(Config(checkpoint=str(tmp_path / "sft.pt"), after=str(tmp_path / "ppo.pt"), device="cpu"))
    numbers = measure(side, [], next_rollout(side))
    assert numbers["scores"].mean().item() == pytest.approx(row["score"], abs=1e-5)
    assert masked_mean(numbers["entropy"], numbers["mask"]).item() == pytest.approx(row["entropy"], abs=1e-5)
    # The critic is the reward model: its value is the score of what stands there so far.
    tokens, prompt_lens = numbers["tokens"], numbers["prompt_lens"]
    torch.testing.assert_close(numbers["value"][:, 0], side.models.reward_model(tokens, prompt_lens), rtol=0, atol=1e-5)
    assert side.config.batch_size == RUN["batch_size"]  # the flags of the run that it is put beside
    assert side_of(tmp_path, "sft.pt").config.batch_size == train_ppo.Config.batch_size  # and alone, the defaults


@pytest.mark.parametrize("name", ["sft.pt", "ppo.pt"])
def test_the_ratio_is_of_the_policy_that_train_ppo_itself_makes_next(name, trained, tmp_path):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    done = 2 if name == "ppo.pt" else 0
    before = contents_of(trained)
    side, _ = load_sides(Config(checkpoint=str(trained / name), after=str(trained / "ppo.pt"), device="cpu"))
    updated, steps = inspect_rollout.updated_policy(side, 1)
    assert contents_of(trained) == before and steps == 4
    train_ppo.train(train_ppo.Config(**RUN | {"out_dir": str(tmp_path), "max_iters": done + 1, "resume": done > 0,
                                              "overwrite": done == 0}))
    expected = load_checkpoint(tmp_path / "ppo.pt", "ppo")["model"]
    assert all(torch.equal(tensor, expected[key]) for key, tensor in updated.state_dict().items())

    response = look(trained, "ppo.pt", updates=1, prompt=SHANGHAI, response=" Shanghai is in China.")["responses"][0]
    ratios = torch.tensor([token["ratio"] for token in response["tokens"]])
    side = side_of(trained)
    tokens = torch.tensor([[token["id"] for token in response["prompt"] + response["tokens"]]])
    now, later = (score_response(policy, tokens, torch.tensor([len(response["prompt"])]), len(ratios))[0][0]
                  for policy in (side.policy, inspect_rollout.updated_policy(side, 1)[0]))
    torch.testing.assert_close(ratios, (later - now).exp(), rtol=1e-4, atol=0)
    assert (ratios - 1).abs().max() > 1e-3


def contents_of(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_the_change_between_checkpoints_is_second_over_first(trained):
    views = look(trained, "sft.pt", after=str(trained / "ppo.pt"), prompt=SHANGHAI, response=" Shanghai is delicious.")
    first, second = ([token for token in view["responses"][0]["tokens"]] for view in views)
    for a, b in zip(first, second):
        assert a["change"] == b["change"] == pytest.approx(pow(2.718281828, b["logprob"] - a["logprob"]), rel=1e-3)
        assert a["kl"] == 0 and b["kl"] == pytest.approx(b["logprob"] - a["logprob"], abs=1e-4)


def test_alternatives_and_log_prob_share_one_distribution(trained):
    side = side_of(trained)
    numbers = measure(side, [], next_rollout(side))
    probabilities, ids = numbers["top_probs"], numbers["top_ids"]
    R, chosen = numbers["mask"].size(1), numbers["mask"].nonzero().tolist()
    assert probabilities.shape == (16, R, 5) and (probabilities.diff(dim=2) <= 0).all()
    met = 0
    for i, t in chosen:
        token = numbers["tokens"][i, numbers["prompt_lens"][i] + t]
        for p in probabilities[i, t][ids[i, t] == token]:
            met += 1
            assert p.item() == pytest.approx(numbers["logprob"][i, t].exp().item(), rel=1e-4)
    assert met > len(chosen) / 4


def test_the_value_by_sampling_is_the_expected_reward_to_go(stages, tmp_path):
    """With a single token to write, the expectation is a sum over the vocabulary."""
    run_ppo(stages, tmp_path, max_new_tokens=1, kl_coef=0.5)
    side = side_of(tmp_path)
    (prompt, response), n = next_rollout(side)[0], 4000
    rows = [(prompt, [token]) for token in range(side.encoding.n_vocab)]
    every = inspect_rollout.shaped(side, rows, *inspect_rollout.rollout_of(side, rows))
    p, to_go = every["logprob"][:, 0].exp(), every["reward_to_go"][:, 0]
    mean = (p * to_go).sum().item()
    std = ((p * (to_go - mean) ** 2).sum() / n).sqrt().item()
    (value, error), = inspect_rollout.sampled_values(side, [(prompt, response)], n, seed=0).values()
    assert value == pytest.approx(mean, abs=4 * std) and error == pytest.approx(std, rel=0.2)
    assert abs(mean) > 8 * std


def test_the_advantage_by_sampling_is_reward_plus_next_value_minus_value(trained):
    tokens = look(trained, completions=8, prompt=SHANGHAI, response=" Shanghai is in China.")["responses"][0]["tokens"]
    after = [token["sampled_value"] for token in tokens[1:]] + [0]
    assert [token["sampled_advantage"] for token in tokens] == \
        pytest.approx([token["reward"] + v - token["sampled_value"] for token, v in zip(tokens, after)], abs=1e-5)


def test_a_run_with_a_reward_function_is_scored_by_it(stages, tmp_path):
    (tmp_path / "reward.py").write_text(
        "def f(prompts, responses):\n"
        "    return [float(p == 'Where is Shanghai?') + len(r) for p, r in zip(prompts, responses)]\n")
    run_ppo(stages, tmp_path / "run", reward=f"{tmp_path / 'reward.py'}:f")
    (tmp_path / "run" / "rm.pt").unlink()
    view = look(tmp_path / "run", prompt=SHANGHAI, response=" China.", updates=1, completions=2)
    assert view["responses"][0]["score"] == 8


def test_a_run_whose_reward_function_takes_rows_is_scored_with_them(stages, tmp_path):
    """With the run's own row for a prompt of the run, and with the file's for a file."""
    rows = [{"prompt": f"Where is {city}?", "answer": city} for city in ("Lima", "Cusco", "Shanghai", "Osaka")]
    run_data = str(tmp_path / "data.jsonl")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "reward.py").write_text("def f(prompts, responses, rows):\n"
                                        "    return [len(row.get('answer', '')) for row in rows]\n")
    folder = tmp_path / "run"
    run_ppo(stages, folder, data=run_data, tokenizer="atlas", reward=f"{tmp_path / 'reward.py'}:f",
            eval=f"{tmp_path / 'reward.py'}:f")
    for asked, score in (({"prompt": SHANGHAI}, 8), ({"prompt": SHANGHAI, "response": " China."}, 8),
                         ({"prompt": "Who?"}, 0), ({"data": jsonl(tmp_path, [rows[2] | {"answer": "xyz"}])}, 3)):
        assert [r["score"] for r in look(folder, updates=1, completions=2, **asked)["responses"]] == [score]
    assert [r["score"] for r in look(folder)["responses"]] == [len("Osaka")]  # which is held out


def test_the_samples_of_a_run_are_shown_as_they_were_scored(trained):
    """Those of the last look. A text whose usual tokens are not those that were sampled may score otherwise."""
    samples = [json.loads(line) for line in (trained / "samples.jsonl").read_text().splitlines()]
    samples = [sample for sample in samples if sample["iter"] == 2]
    assert len(samples) == 16 and len({sample["ended"] for sample in samples}) == 2
    responses = look(trained, samples=str(trained / "samples.jsonl"))["responses"]
    assert [r["ended"] for r in responses] == [sample["ended"] for sample in samples]
    same = [(r, sample) for r, sample in zip(responses, samples) if len(r["tokens"]) == sample["tokens"]]
    assert len(same) > 8 and all(r["score"] == pytest.approx(sample["score"], abs=1e-4) for r, sample in same)


def test_a_number_is_the_same_whatever_else_is_shown(trained, tmp_path):
    row = {"prompt": SHANGHAI, "response": " Shanghai is in China."}
    others = [{"prompt": SHANGHAI, "response": " delicious" * n} for n in range(1, 41)]
    alone, crowded = (look(trained, data=jsonl(tmp_path, [row, *more]))["responses"][0]["tokens"]
                      for more in ([], others))
    for a, b in zip(alone, crowded):
        for name in inspect_rollout.QUANTITIES.keys() & a.keys():
            assert a[name] == pytest.approx(b[name], abs=1e-4), name


# ----------------------------------------------------------------------------------------------------------
# what is shown

def test_the_default_page_on_atlas(trained):
    """It begins with the two sentences of the derivation, and answers to held-out questions follow."""
    responses = look(trained)["responses"]
    texts = ["".join(text for token in r["tokens"] for text, _ in token["show"]) for r in responses]
    assert texts[:2] == ["·Shanghai·is·in·China.EOS", "·Shanghai·is·delicious.EOS"]
    assert [r["origin"] for r in responses] == ["given"] * 2 + ["sampled from ppo.pt"] * 4


def test_only_the_log_ratio_of_the_policys_own_response_is_called_kl(trained, capsys):
    """On a response of another origin the log-ratio estimates no KL."""
    views = look(trained, "sft.pt", after=str(trained / "ppo.pt"))
    for view in views:
        for r in view["responses"]:
            assert r["kl_label"] == ("KL" if r["origin"] == f"sampled from {view['name']}" else "log pi/pi_ref")
    assert len({(view["name"], r["origin"]) for view in views for r in view["responses"]}) == 6
    write(trained, text=True)
    assert re.search(r"^score \S+, log pi/pi_ref \S+ nats", capsys.readouterr().out, re.MULTILINE)


def test_the_colours_of_a_policy_do_not_depend_on_the_other_one(trained):
    flags = dict(prompt=SHANGHAI, response=" Shanghai is in China.")
    views = look(trained, "sft.pt", after=str(trained / "ppo.pt"), **flags)
    for name, view in zip(("sft.pt", "ppo.pt"), views):
        kl = sorted(abs(token["kl"]) for token in view["responses"][0]["tokens"])[-1]
        assert view["limits"]["kl"] == pytest.approx(max(kl, 0.01), rel=0.05)
    assert views[0]["limits"] != views[1]["limits"]


def jsonl(folder, rows):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "rows.jsonl")


def test_rows_of_a_file_are_shown_and_bare_prompts_answered_n_times(trained, tmp_path, capsys):
    rows = [{"prompt": SHANGHAI}, {"prompt": "", "response": ""}, {"prompt": "x", "chosen": " a", "rejected": " b"}]
    responses = look(trained, data=jsonl(tmp_path, rows), n=2)["responses"]
    assert [r["origin"] for r in responses] == ["sampled from ppo.pt"] * 2 + ["given"] * 3
    assert [token["say"] for token in responses[2]["prompt"] + responses[2]["tokens"]] == ["end of text"] * 2
    assert len(look(trained, data=jsonl(tmp_path, [rows[1]] * 70))["responses"]) == 64
    assert "has 70 rows, and the first 64 are shown" in capsys.readouterr().out


def test_a_response_that_was_cut_says_so_and_pays_for_it(trained):
    responses = look(trained, prompt=SHANGHAI, n=8)["responses"]
    cut = [r for r in responses if not r["ended"]]
    assert cut and all(len(r["tokens"]) == RUN["max_new_tokens"] for r in cut)
    for r in cut:
        assert sum(token["reward"] for token in r["tokens"]) == pytest.approx(r["score"] - 1 - 0.05 * r["kl"], abs=1e-4)


@pytest.mark.parametrize("raw, pieces", [
    (b" in", [("·", True), ("in", False)]),
    (b"a\n\t\r", [("a", False), ("↵⇥␍", True)]),
    (b"\xc3", [("<C3>", True)]),
    ("né".encode() + b"\xa9", [("né", False), ("<A9>", True)]),
    ("\u202e\u200bx".encode(), [("<U+202E><U+200B>", True), ("x", False)]),
    ("\u0301".encode(), [("◌\u0301", True)]),
    ("e\u0301".encode(), [("e\u0301", False)]),
    (b"\x00\x1b[31m", [("<U+0000><U+001B>", True), ("[31m", False)]),
    ("\u00a0".encode(), [("<U+00A0>", True)]),
])
def test_what_cannot_be_seen_is_made_visible(raw, pieces):
    assert inspect_rollout.visible(raw) == pieces


def test_a_screen_reader_hears_a_name_for_a_token_that_has_no_letters(trained):
    encoding = side_of(trained).encoding
    said = [inspect_rollout.describe_token(encoding, encoding.encode_single_token(raw))["say"]
            for raw in (b" ", b"\n", b" in")]
    assert said == ["space", "character 10", "in"]


# ----------------------------------------------------------------------------------------------------------
# files, flags and the terminal

def write(folder, **flags):
    inspect_rollout.main(Config(**{"checkpoint": str(folder / "ppo.pt"), "device": "cpu", "updates": 0,
                                   "completions": 0, "prompt": SHANGHAI, "response": " Shanghai is in China."} | flags))


def test_a_page_is_written_over_a_page_of_its_own_but_over_nothing_else(trained, tmp_path):
    path = tmp_path / "page.html"
    write(trained, save=str(path))
    first = path.read_bytes()
    write(trained, save=str(path), response=" Shanghai is delicious.")
    assert path.read_bytes() != first
    path.write_text("my notes")
    with pytest.raises(flags.UserError, match="page.html is there and was not written by this tool: give another"):
        write(trained, save=str(path))
    assert path.read_text() == "my notes"
    write(trained, save=str(path), overwrite=True)
    assert path.read_bytes().startswith(b"<!doctype html>")


NASTY = '</script><script>document.title="owned"</script><!--<img src=x onerror="document.title=1"><b>'


def nasty_contents(trained):
    """What a page shows, with a prompt and a response of tokens that are markup, as in a large vocabulary."""
    contents = inspect_rollout.inspect(Config(checkpoint=str(trained / "ppo.pt"), prompt=SHANGHAI, response=" China.",
                                              device="cpu", updates=0, completions=0))
    response = contents["views"][0]["responses"][0]
    for token in response["prompt"][:1] + response["tokens"][:1]:
        token["show"], token["say"] = inspect_rollout.visible(NASTY.encode()), NASTY
    return contents


def test_a_page_needs_no_other_file_and_no_text_can_end_its_data(trained, tmp_path):
    contents = nasty_contents(trained)
    inspect_rollout.write_page(tmp_path / "page.html", contents)
    page = (tmp_path / "page.html").read_text()
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1]
    assert json.loads(data) == json.loads(json.dumps(contents)) and "<" not in data
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|@import|url\(| src=| href=", page.replace(data, ""))


@pytest.mark.parametrize("flags, says", [
    ({"checkpoint": "nowhere.pt"}, "nowhere.pt is not there: train it first"),
    ({"prompt": None}, "--response answers a --prompt: give both"),
    ({"data": "rows.jsonl"}, "--prompt and --data both say what to show"),
    ({"samples": "samples.jsonl"}, "--prompt and --samples both say what to show"),
    ({"samples": "nowhere.jsonl", "prompt": None, "response": None}, "--samples=nowhere.jsonl has no samples: name"),
    ({"response": " Lima" * 130}, "but the model reads block_size=128: shorten them"),
    ({"prompt": "\ud800"}, '"prompt" has a lone surrogate'),
    ({"n": 0}, "--n=0 must lie in"),
    ({"data": "nowhere.jsonl", "prompt": None, "response": None}, "nowhere.jsonl: No such file"),
    ({"rm": "nowhere.pt"}, "nowhere.pt is not there"),
    ({"init_from": "nowhere.pt"}, "nowhere.pt is not there"),
], ids=str)
def test_bad_input_is_refused_in_a_sentence_before_anything_is_written(flags, says, trained, tmp_path):
    with pytest.raises(ValueError, match=re.escape(says)):
        write(trained, save=str(tmp_path / "page.html"), **flags)
    assert not list(tmp_path.iterdir())


def test_models_of_another_run_and_a_group_run_are_refused(trained, stages, tmp_path):
    run_ppo(stages, tmp_path)
    train_sft.train(train_sft.Config(out_dir=str(tmp_path), device="cpu", max_iters=2, batch_size=4, n_layer=1,
                                     n_head=2, n_embd=32, block_size=128, overwrite=True))
    with pytest.raises(flags.UserError, match="was not trained with .*sft.pt: name the file .* by --init_from"):
        write(tmp_path)
    write(tmp_path, init_from=str(trained / "sft.pt"), updates=1, save=str(tmp_path / "page.html"))
    with pytest.raises(flags.UserError, match="an sft.pt is its own"):
        write(tmp_path, checkpoint=str(tmp_path / "sft.pt"), init_from=str(trained / "sft.pt"))
    run_ppo(stages, tmp_path / "group", advantage="group", samples_per_prompt=4)
    with pytest.raises(flags.UserError, match="there is nothing to see by token"):
        write(tmp_path / "group")


def test_a_long_token_and_many_columns_stay_within_the_terminal(trained):
    view = look(trained, "sft.pt", after=str(trained / "ppo.pt"), prompt=" Lima" * 60, response=" China.", updates=1,
                completions=2)[0]
    view["responses"][0]["tokens"][0]["show"] = [("x" * 300, False)]
    view["responses"][0]["tokens"][0]["top"][0]["show"] = [("y" * 300, False)]
    quantities = [{"name": name, "short": short, "neutral": neutral, "side": "both"}
                  for name, (_, short, neutral, _) in inspect_rollout.QUANTITIES.items()]
    lines = list(inspect_rollout.text_view(view, quantities, False))
    assert 110 < max(map(len, lines)) <= 120 and any("x…" in line for line in lines)


def test_the_terminal_shows_the_numbers_of_the_page(trained, capsys, monkeypatch):
    """Colour appears only where it is wanted."""
    write(trained, text=True, updates=1, completions=4)
    plain = capsys.readouterr().out
    view = look(trained, updates=1, completions=4, prompt=SHANGHAI, response=" Shanghai is in China.")
    tokens = view["responses"][0]["tokens"]
    table = plain[plain.index("\ntoken "):].splitlines()[2:-1]
    assert len(table) == 2 * len(tokens) == 12 and max(map(len, plain.splitlines())) <= 120
    names = [name for name, (_, short, _, _) in inspect_rollout.QUANTITIES.items() if short and name in tokens[0]]
    assert {"whitened", "value", "kl", "reward", "logprob", "ref_logprob", "ratio", "entropy"} <= set(names)
    for line, likeliest, token in zip(table[::2], table[1::2], tokens):
        cells = dict(zip(["token", *names], line.split(), strict=True))
        assert cells.pop("token") == inspect_rollout.plain(token)
        assert {name: float(cell) for name, cell in cells.items()} == \
            pytest.approx({name: token[name] for name in names}, abs=0.0051)
        assert not any("+" in cells[name] for name in ("logprob", "ref_logprob", "entropy", "ratio"))
        assert likeliest.startswith("    likeliest: " + inspect_rollout.plain(token["top"][0]))
        assert likeliest.count(", ") == 4

    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.delenv("NO_COLOR", raising=False)
    write(trained, text=True, updates=1, completions=4)
    coloured = screen.getvalue()
    screen.truncate(0)
    monkeypatch.setenv("NO_COLOR", "1")
    write(trained, text=True, updates=1, completions=4)
    assert screen.getvalue().strip("\0") == plain == re.sub(r"\x1b\[[\d;]*m", "", coloured) and "\x1b" in coloured
    row = next(line for line in coloured.splitlines() if line.startswith("EOS"))
    assert re.search(r"48;5;(153|111|75)m +\+", row) or re.search(r"48;5;(223|215|208)m +-", row)
    assert not re.search(r"48;5;(153|111|75)m +-|48;5;(223|215|208)m +\+", coloured)  # blue is above, orange below


# ----------------------------------------------------------------------------------------------------------
# the page in a real browser

@pytest.fixture(scope="module")
def page(trained, tmp_path_factory):
    """The page of two checkpoints: the derivation's two sentences, and answers of both to another question."""
    folder = tmp_path_factory.mktemp("page")
    rows = [{"prompt": SHANGHAI, "response": response} for response in inspect_rollout.SHANGHAI[1]]
    write(trained, checkpoint=str(trained / "sft.pt"), after=str(trained / "ppo.pt"), prompt=None, response=None,
          data=jsonl(folder, rows + [{"prompt": "Where is Lima?"}]), updates=1, completions=4,
          save=str(folder / "page.html"))
    return folder / "page.html"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    if not CHROMIUM:
        pytest.skip("there is no Chromium on this machine: apt-get install chromium")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def browser(chromium, page):
    """A browser with the page, on a desktop in light mode."""
    show(chromium, page)
    yield chromium
    trouble = ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled")
    assert not [event for event in chromium.events if event["method"] in trouble]
    asked = [event["params"] for event in chromium.events if event["method"] == "Network.requestWillBeSent"]
    assert [params["request"]["url"] for params in asked] == [page.as_uri()]  # not one request but for the file itself


def show(browser, page, width=1280, scheme="light", height=800):
    browser("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
    browser("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    browser.open(page)


TOKEN = """document.querySelector('[data-response="%d"][data-token="%d"].token')"""
COLOURS = "[...document.querySelectorAll('.token')].map(b => getComputedStyle(b).backgroundColor)"
DETAILS = "document.getElementById('details').innerText"


def channels(colour):
    """(red, green, blue) from 0 to 1 of a computed colour."""
    numbers = [float(x) for x in re.findall(r"[\d.]+", colour.replace("srgb", ""))[:3]]
    return numbers if "srgb" in colour else [x / 255 for x in numbers]


def test_tokens_are_blue_above_and_orange_below_the_neutral_number(browser, page):
    """The colour is stronger the farther the number is from neutral."""
    data = json.loads(browser.js("document.getElementById('data').textContent"))
    for index, quantity in enumerate(data["quantities"]):
        browser.js(f"document.querySelectorAll('#quantities input')[{index}].click()")
        tokens = [token for response in data["views"][0]["responses"] for token in response["tokens"]]
        colours = [channels(colour) for colour in browser.js(COLOURS)]
        blueness = []
        for token, (red, green, blue) in zip(tokens, colours, strict=True):
            x = token[quantity["name"]] - quantity["neutral"]
            blueness.append((x, blue - red))
            assert (blue > red) == (x > 0) or abs(blue - red) < 0.01, quantity["name"]
            assert (red > blue) == (x < 0) or abs(blue - red) < 0.01, quantity["name"]
        blueness.sort()
        assert all(a[1] <= b[1] + 1e-6 for a, b in zip(blueness, blueness[1:])), quantity["name"]
        assert quantity["label"] in browser.js("document.getElementById('legend').innerText")


def test_number_keys_and_the_radio_buttons_change_the_colours(browser):
    first = browser.js(COLOURS)
    browser.press("2")
    second = browser.js(COLOURS)
    assert first != second and browser.js("document.querySelector('#quantities input:checked').value") == "1"
    assert browser.js("document.querySelector('.token small').textContent") == \
        browser.js("number(view.responses[0].tokens[0].advantage, byName.advantage)")
    browser.js("document.querySelector('#quantities input').click()")
    assert browser.js(COLOURS) == first


def test_hover_focus_and_tap_show_all_numbers_and_five_alternatives(browser):
    assert "No token is chosen yet" in browser.js(DETAILS)
    for token, act in ((1, "hover"), (2, "focus"), (3, "click")):
        if act == "hover":
            box = browser.js(f"{TOKEN % (0, token)}.getBoundingClientRect().toJSON()")
            browser("Input.dispatchMouseEvent", type="mouseMoved", x=box["left"] + 5, y=box["top"] + 5)
        else:
            browser.js(f"{TOKEN % (0, token)}.{act}()")
        about = browser.js(f"view.responses[0].tokens[{token}]")
        text = browser.js(DETAILS)
        assert f"“{inspect_rollout.plain(about)}”" in text.replace("\n", "")
        assert f"id {about['id']}, position {about['position']}" in text
        for quantity in browser.js("quantities"):
            assert re.search(re.escape(quantity["label"]) + r"\s+" + re.escape(browser.js(
                f"number({about[quantity['name']]}, byName['{quantity['name']}'], 3)")), text), quantity["label"]
        for other in about["top"]:
            assert re.search(re.escape(inspect_rollout.plain(other)) + rf"\s+{other['p']:.4f}", text)
        assert len(about["top"]) == 5
        marks = browser.js("[...document.querySelectorAll('.mark[visibility=visible]')].map(m => m.dataset.token)")
        assert marks == [str(token)]


def test_keys_move_the_focus_and_tab_stops_once_in_each_response(browser):
    where = "[document.activeElement.dataset.response, document.activeElement.dataset.token].join()"
    browser.js(f"{TOKEN % (0, 0)}.focus()")
    visited = []
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "ArrowLeft", "End", "ArrowUp", "Home", "ArrowLeft", "ArrowUp"):
        browser.press(key)
        visited.append(browser.js(where))
    assert visited == ["0,1", "0,2", "1,2", "1,1", "1,4", "0,4", "0,0", "0,0", "0,0"]
    assert browser.js("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert browser.js("[...document.querySelectorAll('article')].every("
                      "a => a.querySelectorAll('.token[tabindex=\"0\"]').length === 1)")


def test_a_screen_reader_finds_names_a_status_and_the_plot_as_a_table(browser):
    assert browser.js(TOKEN % (0, 2) + ".getAttribute('aria-label')") == \
        browser.js("'in, advantage (whitened) ' + number(view.responses[0].tokens[2].whitened, quantity)")
    assert browser.js("[...document.querySelectorAll('[aria-live], [role=status]')].map(e => e.id)") == ["status"]
    for token in (2, 3):
        browser.js(f"{TOKEN % (0, token)}.focus()")
        top = browser.js(f"view.responses[0].tokens[{token}].top[0]")
        assert browser.js("document.getElementById('status').textContent") == (
            f"Token {token + 1} of 6 in response 1: likeliest in its place is {top['say']}, "
            f"with probability {top['p']:.2f}.")
        assert browser.js("[...document.querySelectorAll('[aria-current=true]')].map(b => b.dataset.token)") == \
            [str(token)]
    cells = browser.js("[...document.querySelectorAll('article tbody tr')].map("
                       "r => [...r.cells].map(c => c.textContent))")
    assert cells == browser.js("view.responses.flatMap(r => r.tokens.map(t => "
                               "[plain(t), ...quantities.map(q => number(t[q.name], q))]))")
    for label in browser.js("[...document.querySelectorAll('.plot')].map(s => s.getAttribute('aria-label'))"):
        assert label == ("value, reward-to-go, value by sampling along the response; the same numbers are in the "
                         "table below")
    names = [node["name"]["value"] for node in browser("Accessibility.getFullAXTree")["nodes"]
             if node.get("role", {}).get("value") == "radio"]
    assert "ppo.pt" in names and "advantage (whitened)" in names and "value by sampling" in names


def test_the_plot_goes_through_value_and_reward_to_go(browser):
    lines = browser.js("[...document.querySelector('.plot').querySelectorAll('polyline')].map(l => "
                       "l.getAttribute('points'))")
    tokens = browser.js("view.responses[0].tokens")
    points = [[float(point.split(",")[1]) for point in line.split()] for line in lines]
    numbers = [[token[name] for token in tokens] for name in ("value", "reward_to_go", "sampled_value")]
    heights, values = sum(points, []), sum(numbers, [])
    slope = (heights[0] - heights[-1]) / (values[0] - values[-1])
    assert slope < 0 and [heights[0] + slope * (v - values[0]) for v in values] == pytest.approx(heights, abs=0.01)


def test_the_other_policy_shows_its_own_numbers(browser):
    browser.js(f"{TOKEN % (1, 2)}.focus()")
    before = browser.js("document.querySelector('.token small').textContent"), browser.js(DETAILS)
    browser.js("document.querySelectorAll('#views input')[1].click()")
    after = browser.js("document.querySelector('.token small').textContent"), browser.js(DETAILS)
    assert before[0] != after[0] and before[1] != after[1] and "delicious" in after[1]
    assert "ppo.pt, after 2 rollouts of PPO" in browser.js("document.getElementById('policy').innerText")


CONTRAST = """(() => {
  const paint = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = colour => {
    paint.clearRect(0, 0, 1, 1);
    paint.fillStyle = colour;
    paint.fillRect(0, 0, 1, 1);
    return [...paint.getImageData(0, 0, 1, 1).data].map(x => x / 255);
  };
  const luminance = colour => {
    const [r, g, b] = rgba(colour).map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  document.querySelectorAll("details").forEach(d => d.open = true);
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || ["SCRIPT", "NOSCRIPT"].includes(node.tagName)) continue;
    let ground = node;
    while (rgba(getComputedStyle(ground).backgroundColor)[3] < 1) ground = ground.parentElement;
    const ink = luminance(getComputedStyle(node)[node.ownerSVGElement ? "fill" : "color"]);
    const behind = luminance(getComputedStyle(ground).backgroundColor);
    found.push([(Math.max(ink, behind) + 0.05) / (Math.min(ink, behind) + 0.05), walker.currentNode.data]);
  }
  return found.sort((a, b) => a[0] - b[0]);
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_a_contrast_of_at_least_4_5_in_light_and_dark(scheme, browser, page):
    show(browser, page, scheme=scheme)
    ground = sum(channels(browser.js("getComputedStyle(document.body).backgroundColor"))) / 3
    assert ground > 0.9 if scheme == "light" else ground < 0.2
    browser.js(f"{TOKEN % (1, 2)}.focus()")
    # Both ends of the scale at their strongest, whatever the numbers are.
    browser.js("['above', 'below'].forEach((side, i) => { const b = document.querySelectorAll('.token')[i];"
               "b.className = 'token ' + side; b.style.setProperty('--share', '100%'); })")
    found = browser.js(CONTRAST)
    assert len(found) > 300 and found[0][0] >= 4.5, found[:3]


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_sticks_out_of_a_phone_or_a_desktop(width, browser, page):
    show(browser, page, width)
    browser.js(f"{TOKEN % (1, 2)}.focus()")
    browser.js("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.js("document.documentElement.scrollWidth") <= width
    assert browser.js("[...document.querySelectorAll('.token, #details td, .plot, .key span')].every(e => "
                      f"e.getBoundingClientRect().right <= {width} + 0.5)")
    browser.js("view.responses.forEach(r => r.tokens.forEach(t => { t.value = -987.65 })); plots()")
    assert browser.js("[...document.querySelectorAll('.plot text')].every(e => e.getBoundingClientRect().left >= "
                      "e.ownerSVGElement.getBoundingClientRect().left)")


def test_on_a_phone_the_first_screen_has_a_token_and_no_details(browser, page):
    """The details appear when a token is chosen."""
    show(browser, page, width=390, height=844)
    seen = "document.getElementById('details').offsetHeight > 0"
    assert browser.js(f"{TOKEN % (0, 0)}.getBoundingClientRect().bottom") < 844 and not browser.js(seen)
    assert browser.js("document.getElementById('quantities').offsetHeight") < 80  # one row, which scrolls sideways
    browser.js("document.querySelectorAll('#quantities input')[9].click()")
    assert browser.js("document.documentElement.scrollWidth") == 390
    browser.js(f"{TOKEN % (0, 0)}.click()")
    assert browser.js(seen)
    assert browser.js(f"{TOKEN % (0, 0)}.getBoundingClientRect().bottom") <= \
        browser.js("document.getElementById('details').getBoundingClientRect().top")


def test_markup_that_a_model_emits_stays_text(chromium, trained, tmp_path):
    inspect_rollout.write_page(tmp_path / "page.html", nasty_contents(trained))
    show(chromium, tmp_path / "page.html")
    chromium.js(f"{TOKEN % (0, 0)}.focus()")
    assert chromium.js("document.title") == "What a PPO step sees"
    assert chromium.js("[document.scripts.length, document.querySelectorAll('img, b, i').length]") == [2, 0]
    for place in (".prompt", ".token", "#details h2", "article tbody th"):
        assert NASTY.replace(" ", "·") in chromium.js(f"document.querySelector('main {place}').textContent"), place


def test_a_page_of_many_tokens_is_drawn_in_full(chromium, trained, tmp_path):
    rows = jsonl(tmp_path, [{"prompt": "x", "response": " Lima" * 100}] * 64)
    write(trained, save=str(tmp_path / "page.html"), data=rows, prompt=None, response=None)
    show(chromium, tmp_path / "page.html", width=360)
    assert chromium.js("document.querySelectorAll('.token').length") == 64 * 101
    assert chromium.js("document.documentElement.scrollWidth") <= 360


# ----------------------------------------------------------------------------------------------------------
# slow: the trained default run

@pytest.mark.slow
def test_for_shanghai_in_was_worth_more_than_expected_and_delicious_less(default_run, tmp_path):
    """The derivation's example, as far as it holds on four seeds. By sampling under the SFT policy, which needs no
    critic, it holds. So it does for the whitened GAE of a policy and critic of one rollout. For that of the first
    rollout (the critic is the reward model) and of the last (" in" is expected, so its advantage is the critic's error)
    only the order of the two holds, and on the last the sign of " delicious"."""
    folder, _ = default_run

    def tokens(folder, name, **flags):
        responses = look(folder, name, data=rows, **flags)["responses"]
        found = [r["tokens"][2] for r in responses]
        assert [inspect_rollout.plain(token) for token in found] == ["·in", "·delicious"]
        return found

    rows = jsonl(tmp_path, [{"prompt": SHANGHAI, "response": response} for response in inspect_rollout.SHANGHAI[1]])
    right, nonsense = tokens(folder, "sft.pt", completions=1024)
    assert right["sampled_advantage"] > 0 > nonsense["sampled_advantage"] and right["whitened"] > nonsense["whitened"]
    right, nonsense = tokens(folder, "ppo.pt")
    assert nonsense["whitened"] < min(0, right["whitened"])

    for name in ("sft.pt", "rm.pt"):
        shutil.copy(folder / name, tmp_path)
    train_ppo.train(train_ppo.Config(out_dir=str(tmp_path), device="cpu", max_iters=1))
    right, nonsense = tokens(tmp_path, "ppo.pt")
    assert right["whitened"] > 0 > nonsense["whitened"]
