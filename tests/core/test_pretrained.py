"""Tests of pretrained.py: GPT-2 checkpoints against transformers, and the sentences that refuse one."""

import json
import sys
from functools import partial

import pytest
import tiktoken
import torch

import pretrained
from model import GPTConfig
from pretrained import from_pretrained, save_pretrained
from support.weights import read_safetensors
from tensors import BLOCK, V, gap, make_gpt, random_ids, randomize
from tokenizer import tokenizer_json

ids = partial(random_ids, V)
ENCODING = tiktoken.Encoding("letters", pat_str=".", mergeable_ranks={bytes([65 + i]): i for i in range(V - 1)},
                             special_tokens={"<|endoftext|>": V - 1})


@pytest.fixture
def folder(tmp_path):
    """A checkpoint folder of our own making, and the model in it."""
    gpt, path = make_gpt(torch.float32), tmp_path / "hf"
    save_pretrained(gpt, ENCODING, path)
    return path, gpt


@pytest.fixture
def bin_folder(folder):
    """The same with its weights in pytorch_model.bin."""
    path, gpt = folder
    torch.save({name: w.clone() for name, w in read_safetensors(path / "model.safetensors").items()},
               path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    return path, gpt


def same_trunk(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.trunk.parameters(), b.trunk.parameters(), strict=True))


def rewrite(path, change):
    """Replace the weights of a checkpoint folder by change(weights)."""
    torch.save(change(torch.load(path / "pytorch_model.bin")), path / "pytorch_model.bin")


def hf_model(**sizes):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=V, n_positions=BLOCK, n_layer=2, **sizes)
    return randomize(transformers.GPT2LMHeadModel(config).eval(), seed=4)


@pytest.mark.parametrize("form", ["folder safetensors", "folder bin", "file safetensors", "file bin"])
def test_from_pretrained_gives_transformers_logits(tmp_path, form):
    pytest.importorskip("safetensors")
    hf = hf_model(n_head=2, n_embd=128)  # heads of size 64, so that a bare file can be read
    hf.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    path = tmp_path
    if form.endswith("bin"):
        (tmp_path / "model.safetensors").unlink()
        torch.save(hf.state_dict(), tmp_path / "pytorch_model.bin")  # with lm_head.weight, as in old files
    if form.startswith("file"):
        path = next(p for p in tmp_path.iterdir() if p.suffix in (".safetensors", ".bin"))
    gpt = from_pretrained(str(path))
    assert gpt.config == GPTConfig(BLOCK, V, 2, 2, 128)
    idx = ids(3, BLOCK)
    with torch.no_grad():
        expected = hf(idx).logits
        logits = gpt.policy_head(gpt(idx))
    assert expected.std() > 1 and gap(logits, expected) < 1e-4
    assert (gpt.value_head(gpt(idx)) == 0).all()


def test_save_pretrained_is_read_by_transformers(folder):
    path, gpt = folder
    transformers = pytest.importorskip("transformers")
    hf, info = transformers.AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert type(hf) is transformers.GPT2LMHeadModel and hf.dtype == torch.float32
    assert not any(info.values()), info
    idx = ids(3, BLOCK)
    with torch.no_grad():
        expected = hf.eval()(idx).logits
        assert expected.std() > 0.5 and gap(gpt.policy_head(gpt(idx)), expected) < 1e-4
    assert hf.config.eos_token_id == hf.config.bos_token_id == V - 1


def test_save_pretrained_file_layout(folder):
    """GPT-2's own names and its (in, out) linear layers, which a round trip cannot see."""
    path, gpt = folder
    weights = torch.load(path / "pytorch_model.bin")
    parts = ["ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"]
    layers = [f"h.{i}.{part}" for i in range(2) for part in parts] + ["ln_f"]
    names = [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    assert set(weights) == {"transformer." + name for name in names + ["wte.weight", "wpe.weight"]}
    for name, w in weights.items():
        ours = gpt.trunk.get_parameter(name.removeprefix("transformer.").replace("h.", "blocks."))
        assert torch.equal(w, ours.T if ".c_" in name and name.endswith("weight") else ours), name


def test_generation_config_ends_at_eos_and_samples_from_all_tokens(folder):
    """Without top_k=0 transformers would sample from the 50 likeliest tokens; without max_length, 20 of them."""
    path, _ = folder
    assert json.loads((path / "generation_config.json").read_text()) == {
        "do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_length": BLOCK,
        "bos_token_id": V - 1, "eos_token_id": V - 1, "pad_token_id": V - 1}


def test_the_tokenizer_is_written_beside_the_weights(folder):
    path, _ = folder
    assert json.loads((path / "tokenizer.json").read_text(encoding="utf-8")) == tokenizer_json(ENCODING)
    config = json.loads((path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast" and config["model_max_length"] == BLOCK
    assert {config[name] for name in ("bos_token", "eos_token", "pad_token")} == {"<|endoftext|>"}
    assert config["split_special_tokens"] and config["padding_side"] == "left"


def test_gpt2_round_trip_is_exact(folder, tmp_path):
    path, gpt = folder
    back = from_pretrained(path)
    assert back.config == gpt.config and same_trunk(back, gpt)
    (tmp_path / "empty").mkdir()
    save_pretrained(back, ENCODING, tmp_path / "empty")  # an empty folder may be used
    assert same_trunk(from_pretrained(tmp_path / "empty"), gpt)


def test_from_pretrained_old_file_layouts(folder):
    """No "transformer." prefix, stored causal masks, an lm_head, half precision, dropout: all exist."""
    path, gpt = folder

    def old(weights):
        weights = {name.removeprefix("transformer."): w.half() for name, w in weights.items()}
        weights["lm_head.weight"] = weights["wte.weight"].clone()
        for i in range(2):
            weights[f"h.{i}.attn.bias"] = torch.ones(1, 1, BLOCK, BLOCK)
            weights[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
        return weights

    rewrite(path, old)
    config = json.loads((path / "config.json").read_text())
    for name in pretrained.GPT2_FIXED:
        del config[name]  # absent means GPT-2's own value
    config |= dict(n_inner=4 * 24, resid_pdrop=0.1, attn_pdrop=0.1, activation_function="gelu_pytorch_tanh")
    (path / "config.json").write_text(json.dumps(config))
    back = from_pretrained(path)
    assert back.config.dropout == 0.0 and {p.dtype for p in back.parameters()} == {torch.float32}
    for p, q in zip(back.trunk.parameters(), gpt.trunk.parameters()):
        assert torch.equal(p, q.half().float())


@pytest.mark.parametrize("field, value", [
    ("model_type", "llama"), ("activation_function", "relu"), ("layer_norm_epsilon", 1e-6), ("n_inner", 99),
    ("scale_attn_weights", False), ("scale_attn_by_inverse_layer_idx", True), ("add_cross_attention", True),
    ("tie_word_embeddings", False)])
def test_from_pretrained_refuses_another_architecture(folder, field, value):
    path, _ = folder
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(ValueError, match=f"config.json: {field}.*{value}"):
        from_pretrained(path)


@pytest.mark.parametrize("content, message", [
    ("{", "not a GPT-2 config.json"), ("[1]", "not a GPT-2 config.json"), ("\xff", "not a GPT-2 config.json"),
    ('{"model_type": "gpt2", "n_positions": 16}', "the field 'vocab_size' is missing"),
    ("{}", "the field 'model_type' is missing")])
def test_from_pretrained_refuses_a_broken_config(folder, content, message):
    path, _ = folder
    (path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        from_pretrained(path)


def drop(name):
    return lambda weights: {n: w for n, w in weights.items() if n != "transformer." + name}


def put(name, value):
    return lambda weights: weights | {name: value}


@pytest.mark.parametrize("change, message", [
    (drop("h.1.mlp.c_fc.bias"), r"1 weights are missing \['h.1.mlp.c_fc.bias'\], 0 are unknown"),
    (drop("wte.weight"), r"missing \['wte.weight'\]"),
    (put("score.weight", torch.zeros(1, 24)), r"missing \[\], 1 are unknown \['score.weight'\]"),
    (put("h.2.ln_1.weight", torch.zeros(24)), r"GPT-2 of 2 layers.*unknown \['h.2.ln_1.weight'\]"),
    (put("transformer.wpe.weight", torch.zeros(8, 24)), r"wpe.weight .*\[8, 24\].*\[16, 24\]"),
    (put("transformer.h.0.mlp.c_fc.weight", torch.zeros(96, 24)), r"h.0.mlp.c_fc.*\[96, 24\].*\[24, 96\]"),
    (put("transformer.ln_f.weight", torch.ones(24, dtype=torch.long)), "ln_f.weight is torch.int64"),
    (put("lm_head.weight", torch.zeros(V, 24)), "lm_head.weight differs from wte.weight"),
    (put("iter", 3), "not a plain dictionary of weights"),
    (lambda weights: [1, 2], "not a plain dictionary of weights")])
def test_from_pretrained_is_strict(folder, change, message):
    path, _ = folder
    rewrite(path, change)
    with pytest.raises(ValueError, match=message):
        from_pretrained(path)


@pytest.mark.parametrize("damage", [b"", b"not a checkpoint", "half", "last byte"])
@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
def test_from_pretrained_names_a_damaged_file(folder, file, damage):
    path, gpt = folder
    if file == "model.safetensors":
        save_file = pytest.importorskip("safetensors.torch").save_file
        save_file(torch.load(path / "pytorch_model.bin"), path / file)
    whole = (path / file).read_bytes()
    (path / file).write_bytes({"half": whole[:len(whole) // 2], "last byte": whole[:-1]}.get(damage, damage))
    with pytest.raises(ValueError, match=f"{file} cannot be read as weights"):
        from_pretrained(path)


def test_from_pretrained_prefers_safetensors_and_says_when_it_cannot(folder, monkeypatch):
    path, gpt = folder
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file(torch.load(path / "pytorch_model.bin"), path / "model.safetensors")
    (path / "pytorch_model.bin").write_bytes(b"stale")
    assert same_trunk(from_pretrained(path), gpt)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        from_pretrained(path)


def test_from_pretrained_refuses_what_is_not_there(folder, tmp_path):
    path, _ = folder
    with pytest.raises(FileNotFoundError, match="nowhere does not exist: give a folder.*gpt2-xl"):
        from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="n_embd=24 is not a multiple of 64"):
        from_pretrained(path / "pytorch_model.bin")
    torch.save({"weight": torch.zeros(3, 3)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="no wte.weight, so it is not a GPT-2"):
        from_pretrained(tmp_path / "other.pt")
    (path / "pytorch_model.bin").rename(path / "weights.bin")
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor pytorch_model.bin"):
        from_pretrained(path)
    (path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        from_pretrained(path)


def test_save_pretrained_refuses_to_overwrite_and_bias_free_models(folder, tmp_path):
    path, gpt = folder
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    for taken in (path, path / "config.json"):
        with pytest.raises(FileExistsError, match="not an empty folder"):
            save_pretrained(make_gpt(seed=7), ENCODING, taken)
    assert before == {p.name: p.read_bytes() for p in path.iterdir()}
    with pytest.raises(ValueError, match="bias=False"):
        save_pretrained(make_gpt(bias=False), ENCODING, tmp_path / "no_bias")
    assert not (tmp_path / "no_bias").exists()


def test_a_folder_that_could_not_be_completed_leaves_nothing(tmp_path, monkeypatch):
    def full_disk(weights, file):
        file.write_bytes(b"half")
        raise OSError("No space left on device")
    monkeypatch.setattr(torch, "save", full_disk)
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty"):
        with pytest.raises(OSError, match="No space left"):
            save_pretrained(make_gpt(), ENCODING, tmp_path / name)
    assert [item.name for item in tmp_path.rglob("*")] == ["empty"]


def test_save_pretrained_refuses_an_encoding_with_more_ids_than_the_model(tmp_path):
    with pytest.raises(ValueError, match="the encoding has 37 ids and the model 36"):
        save_pretrained(make_gpt(vocab_size=V - 1), ENCODING, tmp_path / "small")
    assert not any(tmp_path.iterdir())
    save_pretrained(make_gpt(vocab_size=V + 3), ENCODING, tmp_path / "large")
    assert from_pretrained(tmp_path / "large").config.vocab_size == V + 3


def test_download_by_name(folder, tmp_path, monkeypatch, capfd):
    source, gpt = folder
    remote, hub = tmp_path / "remote" / "gpt2", tmp_path / "hub"
    remote.parent.mkdir()
    source.rename(remote)
    weights = remote / "pytorch_model.bin"
    whole = weights.read_bytes()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(hub))
    monkeypatch.setattr(pretrained, "GPT2_URL", remote.parent.as_uri() + "/{name}/{file}")

    # A download that fails, or ends early as if the file were over, leaves nothing for a later call to take.
    weights.unlink()
    with pytest.raises(OSError, match="could not download file://.*pytorch_model.bin.*give a folder"):
        from_pretrained("gpt2")
    assert not [p for p in hub.rglob("*") if p.is_file()]
    weights.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="cannot be read as weights"):
        from_pretrained("gpt2")
    assert not [p for p in hub.rglob("*") if p.is_file()]

    weights.write_bytes(whole)
    capfd.readouterr()
    assert same_trunk(from_pretrained("gpt2"), gpt)
    assert "100" in capfd.readouterr().err  # torch.hub's progress bar: tqdm's, or its own where tqdm is missing
    assert {p.name for p in (hub / "checkpoints" / "gpt2").iterdir()} == {"config.json", "pytorch_model.bin"}
    weights.unlink()
    assert same_trunk(from_pretrained("gpt2"), gpt)  # the second time it comes from the cache
    with pytest.raises(FileNotFoundError, match="gpt3 does not exist"):
        from_pretrained("gpt3")
    save_pretrained(gpt, ENCODING, tmp_path / "gpt2-xl")
    assert same_trunk(from_pretrained("gpt2-xl"), gpt)  # a path that exists is taken before a name
