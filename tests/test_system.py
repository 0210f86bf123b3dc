"""A system test: all three stages on Anthropic's HH pairs at GPT-2's 1,024 tokens of context and with its tokenizer.

`python -m pytest tests/test_system.py -m slow -s` prints what it costs. It shows that everything runs and that the
numbers of the loop hold, not that anything is learned: the model is tiny and takes a few steps.
"""

import json
import resource
import time

import pytest

import data
import train_ppo
import train_rm
import train_sft
from paths import DATA
from support.checkpoint import load_checkpoint

HH = DATA / "hh_harmless_base_test.jsonl.gz"
BLOCK, NEW = 1024, 24
ODD = ["<|endoftext|>", "\x00\x01\x7f", "\u202eright to left\u202c", "👩\u200d👩\u200d👧\u200d👦 🇨🇭",
       "\ufeffé e\u0301", "\t \r\n\u00a0\u2028", "𝔘𝔫𝔦"]


def hh_rows(encoding):
    """HH's longest and shortest dialogues, odd characters in prompts and answers, prompts that just fit and do not."""
    rows, _ = data.read_rows(HH)
    rows = sorted(rows, key=lambda row: len(row["chosen"]))
    exact = encoding.decode(encoding.encode_ordinary("\n\nHuman:" + " long" * 2000)[:BLOCK - NEW - 1])
    assert len(encoding.encode_ordinary(exact)) == BLOCK - NEW - 1
    odd = [{"prompt": f"\n\nHuman: {text}\n\nAssistant:", "chosen": f" {text}", "rejected": ""} for text in ODD]
    return rows[:12] + rows[-12:] + odd + [{"prompt": exact, "chosen": " yes", "rejected": " no"},
                                           {"prompt": exact + " more", "chosen": " yes", "rejected": " no"}]


@pytest.mark.slow
@pytest.mark.skipif(not HH.exists(), reason="the HH file is not there")
def test_every_stage_runs_on_hh_at_1024_tokens(tmp_path, monkeypatch, capsys):
    """The rows have truncated responses, long prompts and odd characters."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(DATA / "tiktoken_cache"))
    rows, out = hh_rows(data.get_tokenizer("gpt2")), tmp_path / "out"
    path = tmp_path / "hh.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    where = {"data": str(path), "out_dir": str(out), "device": "cpu"}
    stages = ((train_sft, train_sft.Config(**where, tokenizer="gpt2", n_layer=2, n_head=2, n_embd=32, block_size=BLOCK,
                                           max_iters=3, batch_size=4, lr=3e-3)),
              (train_rm, train_rm.Config(**where, max_iters=3, batch_size=4, max_new_tokens=NEW)),
              (train_ppo, train_ppo.Config(**where, max_iters=3, batch_size=16, max_new_tokens=NEW)))
    costs = []
    for module, config in stages:
        began = time.process_time()
        module.train(config)
        costs.append(f"{module.__name__}: {config.max_iters} iterations of {config.batch_size} rows, "
                     f"{time.process_time() - began:.0f} s of CPU time, peak memory so far "
                     f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")
    printed = capsys.readouterr().out
    with capsys.disabled():
        print("", *costs, sep="\n")

    # Nothing is cropped: the row one token too long is dropped and counted, that of exactly 1,024 tokens with its EOS
    # trained on.
    assert f"with max_new_tokens={NEW} and an EOS longer than block_size={BLOCK}" in printed
    split = data.load_prompts(str(path), data.get_tokenizer("gpt2"), BLOCK, NEW)
    assert max(map(len, split.train + split.heldout)) == BLOCK - NEW - 1
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    ppo = [row for row in metrics if row["stage"] == "ppo" and "iter" in row]
    assert len(ppo) == 3 and all(row["ratio_first"] == 0 and row["skipped_steps"] == 0 for row in ppo)
    assert all(row["logprob_gap_max"] < 1e-3 and row["score"] is not None for row in ppo)
    assert all(0 < row["response_len"] <= NEW for row in ppo) and min(row["eos_rate"] for row in ppo) < 1  # truncations
    assert load_checkpoint(out / "ppo.pt", "ppo")["model_config"]["block_size"] == BLOCK
    order = data.BatchOrder([1] * len(split.train), 16, 0)
    longest = max(len(split.train[i]) for step in range(3) for i in order.order(step))
    assert longest > 500  # long prompts were in the rollouts, in batches with prompts of a few tokens
