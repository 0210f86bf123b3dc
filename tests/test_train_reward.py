"""Tests of --reward: a user's file is imported as Python would, its function gets texts, its wrong results and
exceptions name the prompt."""

import functools
import importlib
import json
import math
import operator
import reprlib
import sys
import time

import numpy as np
import pytest
import torch

import data
import model
import tiny
from experience import RewardFunction, load_function, load_reward_function, takes_rows
from reward_model import RewardModel
from support.flags import UserError
from tiny import command, metrics, pairs, reward_file, run, tiny_flags, write_jsonl


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a file of a user's, of the given lines, and returns its path. Its module is forgotten at the end."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = {*sys.modules}

    def write(name, *lines):
        path = tmp_path / "rewards" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n")
        return path
    yield write
    places = {name: [getattr(sys.modules[name], "__file__", None), *getattr(sys.modules[name], "__path__", [])]
              for name in {*sys.modules} - before}
    for name in places:
        if any(str(place).startswith(str(tmp_path)) for place in places[name]):
            del sys.modules[name]


# ---------------------------------------------------------------------------------------------------------------------
# the file

@pytest.mark.parametrize("name, start", [("mine.py", "fork"), ("mine.py", "spawn"), ("data.py", "fork"),
                                         ("data.py", "spawn"), ("mine.v2.py", "fork")])
def test_a_reward_file_is_a_module_here_and_in_its_children(name, start, write):
    """Its annotations are texts, which dataclasses look up in sys.modules; it has a file beside it and a pool."""
    write("beside.py", "BONUS = 0.5")
    file = write(name, "from __future__ import annotations",
                 "import multiprocessing",
                 "from concurrent.futures import ProcessPoolExecutor",
                 "from dataclasses import dataclass, fields",
                 "from beside import BONUS",
                 "@dataclass",
                 "class Judge:",
                 "    bonus: float = BONUS",
                 "    def score(self, response):",
                 "        return len(response) + self.bonus",
                 "def f(prompts, responses):",
                 f"    with ProcessPoolExecutor(2, multiprocessing.get_context('{start}')) as pool:",
                 "        return list(pool.map(Judge().score, responses))")
    scores, _ = load_reward_function(f"{file}:f")(["a", "b"], ["x", "xyz"], [None, None])
    assert scores.tolist() == [1.5, 3.5]
    assert sys.modules["data"] is data


def test_many_files_of_one_name_get_names_that_a_child_can_import(write):
    names = set()
    for folder in "abcdefghij":
        file = write(f"{folder}/data.py", "def f(prompts, responses):", "    return []")
        name = load_function(f"{file}:f", "reward").__module__
        del sys.modules[name]  # a spawned child has the same sys.path, and our modules
        assert importlib.import_module(name).__file__ == str(file)
        names.add(name)
    assert len(names) == 10 and sys.modules["data"] is data


def test_a_file_of_ours_may_be_the_reward_file(write):
    """It is a second module then, so that nothing of ours is replaced."""
    f = load_function(f"{tiny.__file__}:pairs", "reward")
    assert f is not pairs and f() == pairs() and sys.modules["tiny"] is tiny


def test_a_file_beside_the_reward_file_may_be_called_like_one_of_ours(write):
    write("model.py", "class Judge:", "    score = 7")
    file = write("mine.py", "from model import Judge", "import support.flags",
                 "def f(prompts, responses):", "    return [Judge.score for _ in responses]")
    path = sys.path[0]
    assert load_function(f"{file}:f", "reward")([], [0]) == [7]
    assert sys.modules["model"] is model and sys.modules["mine"].support.flags.UserError is UserError
    assert sys.path[0] == path and sys.path[1] == str(file.parent)


def test_a_reward_file_is_executed_once_until_it_changes(write):
    lines = ["print('loading the judge')", "def f(prompts, responses):", "    return [1] * len(responses)",
             "def g(prompts, responses):", "    return [2] * len(responses)"]
    file = write("mine.py", *lines)
    f, g = (load_function(f"{file}:{name}", "reward") for name in "fg")
    assert f.__globals__ is g.__globals__
    write("mine.py", *lines[:2], "    return [3] * len(responses)")
    assert load_function(f"{file}:f", "reward")([], [0]) == [3]
    assert load_function(f"{file}:f", "reward").__module__ == "mine"


@pytest.mark.parametrize("line, says", [
    ("def f(prompts, responses) return", r"mine\.py, line 2: expected ':'$"),
    ("\tx = 1", r"mine\.py, line 2: unexpected indent$"),
    ("x = '\0'", r"mine\.py, line 1: source code string cannot contain null bytes$"),
    ("import broken", r"broken\.py, line 1: '\(' was never closed$"),
    ("import no_such_package", r"mine\.py, line 2, raised ModuleNotFoundError\(.*no_such_package.*\) when it was "
                               r"imported; `python .*mine\.py` shows the whole traceback$"),
    ("open('/no/such/file')", r"mine\.py, line 2, raised FileNotFoundError"),
    ("import late", r"mine\.py, line 2, raised ZeroDivisionError"),
    ("raise SystemExit('no key')", r"mine\.py, line 2, raised SystemExit\('no key'\)")])
def test_a_file_that_cannot_be_imported_is_said_in_a_sentence(line, says, write):
    write("broken.py", "x = (")
    write("late.py", "1 / 0")
    file = write("mine.py", "import math", line)
    with pytest.raises(UserError, match=says) as error:
        load_reward_function(f"{file}:f")
    assert "\n" not in str(error.value) and "mine" not in sys.modules
    write("mine.py", "def f(prompts, responses):", "    return []")
    assert callable(load_reward_function(f"{file}:f"))


def test_a_syntax_error_in_the_reward_file_exits_2(world, tmp_path, capsys):
    (tmp_path / "mine.py").write_text("def f(:\n")
    assert command("train_ppo.py", *tiny_flags("ppo", world("ppo"), reward=f"{tmp_path / 'mine.py'}:f")) == 2
    assert capsys.readouterr().err.endswith("mine.py, line 1: invalid syntax\n")


# ---------------------------------------------------------------------------------------------------------------------
# the function


def test_the_reward_function_gets_texts_without_eos(world, tmp_path):
    (tmp_path / "reward.py").write_text(
        "import json, pathlib\n"
        "def f(prompts, responses):\n"
        "    assert isinstance(prompts, list) and isinstance(responses, list)\n"
        "    file = pathlib.Path(__file__).with_name(f'{len(prompts)}.json')\n"
        "    file.write_text(json.dumps([prompts, responses]))\n"
        "    return [1] * len(prompts)\n")
    run("ppo", world("ppo"), max_iters=1, reward=f"{tmp_path / 'reward.py'}:f")
    # a rollout, and not a look at held-out rows
    prompts, responses = json.loads((tmp_path / "12.json").read_text())
    assert len(prompts) == len(responses) == 12
    assert set(prompts) <= {row["prompt"] for row in pairs()}
    assert all(isinstance(response, str) and "<|" not in response for response in responses)


def scores_of(function, prompts, responses):
    return RewardFunction(function)(prompts, responses, [{"prompt": prompt} for prompt in prompts])[0]


def short(parameter):
    return reprlib.repr(parameter)[:40]


@pytest.mark.parametrize("scores", [
    [1, 0.5], (1, 0.5), [True, 0.5], [np.float32(1), np.float64(0.5)], [np.bool_(True), np.float16(0.5)],
    [torch.tensor(1), torch.tensor(0.5, requires_grad=True)], [np.array(1), 0.5], np.array([1, 0.5], dtype=np.float16),
    np.array([2, 1, 0.5, 0.5])[1::2], np.array([1, 0.5], dtype=object), torch.tensor([1, 0.5], dtype=torch.bfloat16),
    torch.tensor([1, 0.5], requires_grad=True) * 1], ids=short)
def test_what_the_reward_function_may_return(scores):
    result = scores_of(lambda prompts, responses: scores, ["p", "q"], ["a", "b"])
    assert result.tolist() == [1, 0.5] and result.dtype == torch.float32 and not result.requires_grad


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint8", "int32", "uint64", "int64", "longdouble"])
def test_arrays_of_whole_numbers_are_scores_too(dtype):
    result = scores_of(lambda prompts, responses: np.array([1, 0], dtype=dtype), ["p", "q"], ["a", "b"])
    assert result.tolist() == [1, 0] and result.dtype == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_scores_on_a_gpu_are_taken():
    result = scores_of(lambda prompts, responses: torch.ones(2, device="cuda"), ["p", "q"], ["a", "b"])
    assert result.tolist() == [1, 1] and result.device.type == "cpu"


ONE = r"for the prompt 'q' and the response 'b': it must be a finite number$"
ALL = (r"for 2 responses: it must return a list of as many numbers, a tensor or array of shape \(2,\), or a dict of "
       "such parts$")


@pytest.mark.parametrize("scores, says", [
    ([0.0], r"\[0.0\] of length 1 " + ALL), ([0.0] * 99, r"\[0.0, .*\.\.\.\] of length 99 " + ALL),
    ({"a": [1, 2], "b": [3]}, r"returned \[3\] of length 1 as the part b " + ALL),
    ({"a": [1, 2], "b": 3}, "returned 3 as the part b " + ALL),
    ({"a": [1, 2], "b": [3, math.nan]}, "returned nan as the part b " + ONE),
    ({"a": [1, 3e38], "b": [3, 3e38]}, r"returned 6e\+38 as the sum of its parts " + ONE),
    ({"a b": [1, 2]}, "returned a part with the name 'a b': give it a valid variable name$"),
    ({1: [1, 2]}, "returned a part with the name 1: give it"),
    ({}, "returned a dict without parts: it must hold a list of numbers for each part$"),
    ({"a": 1, "b": 2}.keys(), r"dict_keys\(\['a', 'b'\]\) of length 2 " + ALL),
    ({1, 2}, r"\{1, 2\} of length 2 " + ALL),
    (0.5, "returned 0.5 " + ALL), (None, "returned None " + ALL), ("11", "returned '11' " + ALL),
    (b"11", "returned b'11' " + ALL), ((x for x in (1, 2)), "returned <generator .*> " + ALL),
    (np.float32(1), "returned .*1.0.* " + ALL), (torch.tensor(1.0), r"returned tensor\(1.\) " + ALL),
    (torch.ones(2, 1), r"returned a value of type Tensor and shape \(2, 1\) " + ALL),
    (np.ones((2, 1)), r"returned a value of type ndarray and shape \(2, 1\) " + ALL),
    (np.ones(3), r"returned a value of type ndarray and shape \(3,\) " + ALL),
    ([1, math.nan], "returned nan " + ONE), ([1, -math.inf], "returned -inf " + ONE), ([1, "1"], "returned '1' " + ONE),
    ([1, None], "returned None " + ONE), ([1, 1e39], r"returned 1e\+39 " + ONE),
    ([1, 10**400], "returned 10+.* " + ONE),
    ([1, [1]], r"returned \[1\] of length 1 " + ONE), ([1, 1j], "returned 1j " + ONE),
    ([1, torch.ones(1)], r"returned a value of type Tensor and shape \(1,\) " + ONE),
    ([1, torch.tensor(math.nan)], "returned nan " + ONE), (torch.tensor([1, math.nan]), "returned nan " + ONE),
    (np.array([1, np.inf]), "returned inf " + ONE), (np.array([1, None]), "returned None " + ONE),
    (np.array(["1", "2"]), "returned '1' for the prompt 'p' and the response 'a'")], ids=short)
def test_what_the_reward_function_may_not_return(scores, says):
    with pytest.raises(UserError, match=says) as error:
        scores_of(lambda prompts, responses: scores, ["p", "q"], ["a", "b"])
    assert "\n" not in str(error.value)


def test_a_wrong_result_ends_the_run_before_it_is_used(world, tmp_path):
    with pytest.raises(UserError, match=r"returned nan for the prompt '\w+ or "):
        run("ppo", world("ppo"), max_iters=1, reward=reward_file(tmp_path, "[float('nan')] * len(responses)"))


def test_an_exception_of_the_reward_function_comes_with_the_prompt(world, tmp_path):
    """The traceback points into the user's file, as no sentence of ours could. The prompt is the one at fault."""
    body = "[float('?' in prompt or {}['mine']) for prompt in prompts]"
    folder = world("ppo")
    rows = pairs()
    rows[7]["prompt"] = "no question mark"
    write_jsonl(folder / "pairs.jsonl", rows)
    with pytest.raises(RuntimeError, match=r"raised KeyError\('mine'\) for the prompt 'no question mark' and the "
                                           "response '") as raised:
        run("ppo", folder, batch_size=48, minibatches=2, reward=reward_file(tmp_path, body))
    assert isinstance(raised.value.__cause__, KeyError)
    assert raised.value.__cause__.__traceback__.tb_next.tb_frame.f_code.co_filename.endswith("reward.py")


def test_a_reward_function_that_fails_on_a_batch_only(world, tmp_path):
    """The message then names the first prompt of the batch."""
    with pytest.raises(RuntimeError, match="for 12 responses at once and for none of them alone; the first "
                                           "prompt is '"):
        run("ppo", world("ppo"), reward=reward_file(tmp_path, "[1.0] if len(prompts) == 1 else 1 / 0"))


class Judge:
    def __call__(self, prompts, responses, rows):
        return [1.0] * len(rows)


@pytest.mark.parametrize("function, expected", [
    (lambda prompts, responses: 0, False), (lambda prompts, responses, rows: 0, True),
    (lambda p, r, answers, /: 0, True),
    (lambda prompts, responses, scale=2: 0, False), (lambda prompts, responses, rows=None: 0, True),
    (lambda *args: 0, False), (lambda prompts, *rest: 0, False), (lambda p, r, *rest, rows=None: 0, False),
    (Judge(), True), (Judge().__call__, True), (functools.partial(lambda scale, p, r: 0, 2), False),
    (functools.wraps(Judge().__call__)(lambda *args: 0), True), (operator.itemgetter(0), False), (max, False)],
    ids=range(14))
def test_rows_are_for_functions_that_take_a_third_argument(function, expected):
    """An argument with a default is an option of the function's, unless it is called rows. *args stand for two."""
    assert takes_rows(function) == expected


@pytest.mark.parametrize("arguments", ["prompts", "a, b, c, d", "prompts, responses, *, key", ""])
def test_a_function_that_cannot_be_called_is_refused_at_once(arguments, write):
    file = write("mine.py", f"def f({arguments}):", "    return []")
    with pytest.raises(UserError, match=r"^--eval=.*mine\.py:f takes \(.*\): it must take \(prompts, responses\) or "
                                        r"\(prompts, responses, rows\)$"):
        load_reward_function(f"{file}:f", "eval")


@pytest.mark.parametrize("spec, flag, says", [
    ("mine.py", "reward", "--reward=mine.py must be rm or path/to/file.py:function"),
    ("f", "eval", "--eval=f must be path/to/file.py:function"),
    ("no.py:f", "eval", "--eval=no.py:f: no.py is not there")])
def test_the_message_about_a_file_names_its_flag(spec, flag, says):
    with pytest.raises(UserError, match=f"^{says}$"):
        load_reward_function(spec, flag)


def test_the_reward_function_sees_the_rows_of_its_prompts(world, write):
    """All keys of the file, in a file whose prompts all occur twice, with another answer each time."""
    folder, file = world("ppo"), write("mine.py", "SEEN = []", "def f(prompts, responses, rows):",
                                       "    assert len(prompts) == len(responses) == len(rows)",
                                       "    assert all(row['prompt'] == prompt for row, prompt in zip(rows, prompts))",
                                       "    SEEN.extend(row['more']['answer'] for row in rows)",
                                       "    return [len(row['chosen']) for row in rows]")
    rows = [row | {"more": {"answer": [i, None, math.nan]}} for i, row in enumerate(pairs() + pairs())]
    write_jsonl(folder / "pairs.jsonl", rows)
    run("ppo", folder, max_iters=7, reward=f"{file}:f")
    seen = load_function(f"{file}:f", "reward").__globals__["SEEN"]
    assert {answer[0] for answer in seen} == {*range(80)} and all(math.isnan(answer[2]) for answer in seen)


def test_rows_of_the_built_in_task_have_the_prompt(world, tmp_path):
    (tmp_path / "mine.py").write_text("def f(prompts, responses, rows):\n"
                                      "    assert rows == [{'prompt': prompt} for prompt in prompts]\n"
                                      "    return [1] * len(rows)\n")
    run("ppo", world("ppo", "atlas"), max_iters=1, reward=f"{tmp_path / 'mine.py'}:f")


def test_the_score_is_the_sum_of_its_parts_and_each_is_logged(world, tmp_path):
    body = "{'long': torch.tensor([len(r) / 2 for r in responses]), 'e': [r.count('e') for r in responses]}"
    (tmp_path / "mine.py").write_text(f"import torch\ndef f(prompts, responses):\n    return {body}\n")
    folder, same = world("ppo"), world("ppo")
    run("ppo", folder, reward=f"{tmp_path / 'mine.py'}:f")
    run("ppo", same, reward=reward_file(tmp_path, "[len(r) / 2 + r.count('e') for r in responses]"))
    assert metrics(folder, "ppo", "reward_long", "reward_e") == metrics(same, "ppo")
    for row in metrics(folder, "ppo"):
        assert row["reward_long"] > 0 and row["reward_long"] + row["reward_e"] == pytest.approx(row["score"], rel=1e-6)


@pytest.mark.parametrize("first, then, says", [
    ({"a": [1.0]}, {"b": [1.0]}, "the parts a at first and now b"), ({"a": [1.0]}, [1.0], "a at first and now none"),
    ([1.0], {"a": [1.0]}, "none at first and now a"), ({"a": [1], "b": [1]}, {"b": [1]}, "a, b at first and now b")])
def test_parts_have_the_same_names_in_each_call(first, then, says):
    function = RewardFunction(lambda prompts, responses: [*then] if isinstance(then, list) and prompts[0] else
                              (then if prompts[0] else first))
    function([""], ["a"], [None])
    with pytest.raises(UserError, match=rf"the reward function <lambda> returned {says}|returned the parts {says}"):
        function(["p"], ["a"], [None])
    function([""], ["a"], [None])


def test_the_order_of_the_parts_does_not_matter():
    results = iter([{"b": [1], "a": [2]}, {"a": [2], "b": [1]}])
    function = RewardFunction(lambda prompts, responses: next(results))
    for _ in range(2):
        scores, parts = function(["p"], ["r"], [None])
        assert scores.tolist() == [3] and [*parts] == ["reward_a", "reward_b"]


def test_no_part_of_an_evaluation_takes_the_name_of_its_error():
    with pytest.raises(UserError, match="the eval function <lambda> returned a part with the name 'se'.* error$"):
        RewardFunction(lambda prompts, responses: {"se": [1]}, "eval")(["p"], ["r"], [None])


def test_an_exception_in_a_function_of_rows_says_what_the_row_has():
    def f(prompts, responses, rows):
        return [row["answer"] for row in rows]
    rows = [{"prompt": "p", "answer": 1}, {"prompt": "q", "solution": 2}]
    with pytest.raises(RuntimeError, match=r"^the reward function f raised KeyError\('answer'\) for the prompt 'q' and "
                                           "the response 'b', whose row has prompt, solution$"):
        RewardFunction(f)(["p", "q"], ["a", "b"], rows)


@pytest.mark.parametrize("result", [
    lambda responses: [0.5] * len(responses), lambda responses: torch.ones(len(responses)),
    lambda responses: {name: np.ones(len(responses)) for name in "abcdefgh"}], ids=["list", "tensor", "eight parts"])
def test_a_function_over_512_responses_costs_little_more_than_itself(result):
    """The promise is 50 ms. This machine may be busy, so the best of several calls counts."""
    inside, outside, text = [], [], "word " * 2000

    def f(prompts, responses, rows):
        began = time.perf_counter()
        scores = result(responses)
        inside.append(time.perf_counter() - began)
        return scores

    function = RewardFunction(f)
    for _ in range(5):
        began = time.perf_counter()
        function([text] * 512, [text] * 512, [{"prompt": text}] * 512)
        outside.append(time.perf_counter() - began)
    assert min(whole - own for whole, own in zip(outside, inside)) < 0.05


@pytest.mark.parametrize("n", [1, 2, 3, 64, 1000])
def test_few_calls_find_the_response_that_fails(n):
    """A call may take long or cost money, so responses are not tried one by one."""
    for bad in {0, n // 3, n - 1}:
        calls = []

        def f(prompts, responses):
            calls.append(len(responses))
            return [1 / (response != f"r{bad}") for response in responses]
        with pytest.raises(RuntimeError, match=f"for the prompt 'p{bad}' and the response 'r{bad}'$"):
            scores_of(f, [f"p{i}" for i in range(n)], [f"r{i}" for i in range(n)])
        assert len(calls) <= 3 + math.log2(n) and sum(calls) <= 2 * n + 3 + math.log2(n)


def test_of_several_responses_that_fail_the_first_is_named():
    with pytest.raises(RuntimeError, match="for the prompt 'p5' and the response 'r5'$"):
        scores_of(lambda prompts, responses: [1 / (response not in ("r5", "r6", "r30")) for response in
                                                         responses],
                  [f"p{i}" for i in range(40)], [f"r{i}" for i in range(40)])


def test_a_score_that_is_not_finite_is_an_error_with_its_prompt(world, monkeypatch):
    """Averaged into the advantages it would reach every token of the rollout."""
    forward = RewardModel.forward

    def poisoned(self, tokens, lens):
        scores = forward(self, tokens, lens)
        scores[-1] = math.nan
        return scores
    monkeypatch.setattr(RewardModel, "forward", poisoned)
    folder = world("ppo")
    with pytest.raises(FloatingPointError, match=r"the reward model's score is nan for the prompt '\w+ or \w+\?' and"):
        run("ppo", folder)
    assert not (folder / "ppo.pt").exists()


def test_with_a_reward_function_no_reward_model_is_trained_or_read(world, reward_e):
    folder = world("rm")
    run("ppo", folder, max_iters=1, reward=reward_e, critic="separate")
    assert not (folder / "rm.pt").exists() and (folder / "ppo.pt").exists()
