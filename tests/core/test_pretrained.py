"""Tests of pretrained.py and support/weights.py: four families against transformers, and the sentences that refuse."""

import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import tiktoken
import torch

import train_sft
from model import GPT, KVCache
from paths import ROOT
from pretrained import FAMILIES, LLAMA, QWEN2, QWEN3, family_of, from_pretrained, is_pretrained, save_pretrained
from support import weights
from support.flags import UserError
from support.stages import check_vocabulary
from support.weights import read_safetensors, read_weights, write_safetensors
from tensors import BLOCK, V, gap, make_gpt, random_ids
from tokenizer import get_tokenizer, tokenizer_json

ids = partial(random_ids, V)
TINY = ROOT / "tests" / "tiny_models"
SMOLLM2 = Path(os.environ.get("PPO_TEST_SMOLLM2", ""))
ENCODING = tiktoken.Encoding("letters", pat_str=".", mergeable_ranks={bytes([65 + i]): i for i in range(V - 1)},
                             special_tokens={"<|endoftext|>": V - 1})
SCALING = (8.0, 1.0, 4.0, 8)
CONFIGS = {"gpt2": {}, "gpt2 untied, erf": dict(mlp="gelu_erf", tied=False, mlp_dim=20),
           "gpt2 without bias": dict(bias=False),
           "llama": LLAMA.kind | dict(n_kv_head=1, mlp_dim=20, norm_eps=1e-3, rope_base=100.0),
           "llama untied, scaled": LLAMA.kind | dict(n_kv_head=3, mlp_dim=20, tied=False, rope_scaling=SCALING),
           "qwen2": QWEN2.kind | dict(n_kv_head=1, mlp_dim=20, tied=False),
           "qwen3": QWEN3.kind | dict(n_kv_head=1, head_dim=10, mlp_dim=20)}


def logits_of(gpt, idx):
    with torch.no_grad():
        return gpt.policy_head(gpt(idx))


def same_weights(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def save(path, name="gpt2", dtype=torch.float32):
    """A model of one of CONFIGS, saved in a folder of our own writing."""
    gpt = make_gpt(dtype, **CONFIGS[name])
    with torch.no_grad():
        for p in gpt.value_head.parameters():
            p.zero_()
    save_pretrained(gpt, ENCODING, path)
    return gpt


def change_weights(path, change):
    """Replaces the weights of a folder by change(weights)."""
    read = {name: w.clone() for name, w in read_safetensors(path / "model.safetensors").items()}
    write_safetensors(change(read), path / "model.safetensors")


def to_bin(path, change=lambda read: read):
    """The same weights in pytorch_model.bin, as change(weights) leaves them."""
    read = {name: w.clone() for name, w in read_safetensors(path / "model.safetensors").items()}
    (path / "model.safetensors").unlink()
    torch.save(change(read), path / "pytorch_model.bin")


def to_shards(path, suffix="safetensors"):
    """The same weights in three files and an index."""
    read = {name: w.clone() for name, w in read_safetensors(path / "model.safetensors").items()}
    (path / "model.safetensors").unlink()
    stem, write = ("model", write_safetensors) if suffix == "safetensors" else ("pytorch_model", torch.save)
    files = {name: f"{stem}-0000{1 + i % 3}-of-00003.{suffix}" for i, name in enumerate(read)}
    for file in set(files.values()):
        write({name: read[name] for name in read if files[name] == file}, path / file)
    (path / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def set_fields(path, **fields):
    config = json.loads((path / "config.json").read_text()) | fields
    (path / "config.json").write_text(json.dumps({name: value for name, value in config.items() if value != "absent"}))


# ---------------------------------------------------------------------------------------------------------------------
# the numbers of transformers

@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_that_transformers_gave(family):
    """The folders and logits of tests/tiny_models were made by transformers, whose fields are the newer spelling."""
    gpt, made = from_pretrained(TINY / family), json.loads((TINY / family / "logits.json").read_text())
    expected = torch.tensor(made["logits"]).view(2, 40, 37)
    assert family_of(gpt.config) == family and expected.std() > 1
    assert gap(logits_of(gpt, torch.tensor(made["ids"])), expected) < 1e-4
    assert (gpt.value_head(gpt(torch.tensor(made["ids"]))) == 0).all() and gpt.config.dropout == 0
    assert {p.dtype for p in gpt.parameters()} == {torch.float32}


@pytest.mark.parametrize("family, field, value", [
    ("gpt2", "norm_eps", 1e-2), ("gpt2", "mlp", "gelu_erf"), ("llama", "norm_eps", 1e-4), ("llama", "rope_base", 550.0),
    ("llama", "rope_scaling", None), ("llama", "rope_scaling", (4.0, 1.0, 4.0, 16)), ("qwen2", "rope_base", 90.0),
    ("qwen3", "norm_eps", 1e-2)])
def test_a_wrong_field_would_be_seen_in_these_logits(family, field, value):
    gpt, made = from_pretrained(TINY / family), json.loads((TINY / family / "logits.json").read_text())
    wrong = GPT(replace(gpt.config, **{field: value}))
    wrong.load_state_dict(gpt.state_dict())
    assert gap(logits_of(wrong, torch.tensor(made["ids"])), torch.tensor(made["logits"]).view(2, 40, 37)) > 2e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_ragged_decoding_equals_a_full_pass(family):
    gpt = from_pretrained(TINY / family)
    idx, lens = random_ids(37, 3, 40), torch.tensor([3, 20, 36])
    full, cache = logits_of(gpt, idx), KVCache(gpt.config, 3, 40, "cpu", torch.float32)
    with torch.no_grad():
        gpt(idx[:, :36], cache=cache)
        for step in range(4):
            where = lens + step
            hidden = gpt(idx.gather(1, where[:, None]), cache=cache, positions=where)
            assert gap(gpt.policy_head(hidden[:, 0]), full[torch.arange(3), where]) < 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_saves_is_read(tmp_path, family, shards, dtype):
    transformers = pytest.importorskip("transformers")
    hf = transformers.AutoModelForCausalLM.from_pretrained(TINY / family, dtype=getattr(torch, dtype)).eval()
    hf.save_pretrained(tmp_path, max_shard_size="3KB" if shards else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == shards
    idx = random_ids(37, 2, 48)
    with torch.no_grad():
        expected = hf.float()(idx).logits
    assert expected.std() > 1 and gap(logits_of(from_pretrained(tmp_path), idx), expected) < 1e-4


@pytest.mark.parametrize("name", CONFIGS)
def test_what_we_save_is_read_by_transformers(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    gpt = save(tmp_path / "hf", name)
    hf, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert hf.dtype == torch.float32 and not any(info.values()), info
    assert type(hf).__name__ == FAMILIES[family_of(gpt.config)].architecture
    idx = ids(3, BLOCK)
    with torch.no_grad():
        expected = hf.eval()(idx).logits
    assert expected.std() > 0.5 and gap(logits_of(gpt, idx), expected) < 1e-4
    assert hf.config.eos_token_id == V - 1
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "hf").encode("BAD") == [1, 0, 3]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_round_trip_is_exact(tmp_path, name):
    gpt = save(tmp_path / "hf", name)
    back = from_pretrained(tmp_path / "hf")
    if gpt.config.bias or gpt.config.position == "rope":
        assert back.config == gpt.config and same_weights(back, gpt)
    else:  # GPT-2 has biases everywhere: written as zeros
        assert back.config == replace(gpt.config, bias=True)
    assert torch.equal(logits_of(back, ids(3, BLOCK)), logits_of(gpt, ids(3, BLOCK)))


@pytest.mark.skipif(not (SMOLLM2 / "config.json").is_file(), reason="PPO_TEST_SMOLLM2 names no folder")
def test_smollm2_reads_text_as_well_as_it_should():
    """Perplexity of its (4-bit dequantised) weights on 20,000 characters of TinyStories, in windows of 512 tokens."""
    from paths import DATA
    gpt, encoding = from_pretrained(SMOLLM2), get_tokenizer(SMOLLM2)
    text = (DATA / "tinystories_valid.txt").read_text(encoding="utf-8")[:20_000]
    tokens, losses = torch.tensor(encoding.encode(text, allowed_special="all")), []
    for row in tokens.split(512):
        losses.append(torch.nn.functional.cross_entropy(logits_of(gpt, row[None, :-1])[0], row[1:], reduction="none"))
    assert 10.9 < torch.cat(losses).mean().exp() < 11.7


# ---------------------------------------------------------------------------------------------------------------------
# what is written

def test_files_of_a_saved_gpt2(tmp_path):
    """GPT-2's own names and its (in, out) linear layers, which a round trip cannot see."""
    gpt = save(tmp_path / "hf")
    read = read_weights(tmp_path / "hf" / "model.safetensors")
    parts = ["ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"]
    layers = [f"h.{i}.{part}" for i in range(2) for part in parts] + ["ln_f"]
    names = [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    assert set(read) == {"transformer." + name for name in names + ["wte.weight", "wpe.weight"]}
    for name, w in read.items():
        ours = gpt.trunk.get_parameter(name.removeprefix("transformer.").replace("h.", "blocks."))
        assert torch.equal(w, ours.T if ".c_" in name and name.endswith("weight") else ours), name


def test_files_of_a_saved_qwen3(tmp_path):
    save(tmp_path / "hf", "qwen3")
    read = read_weights(tmp_path / "hf" / "model.safetensors")
    assert set(read) == set(read_weights(TINY / "qwen3" / "model.safetensors"))
    assert {name: list(w.shape) for name, w in read.items() if "layers.1.self_attn" in name} == {
        f"model.layers.1.self_attn.{name}.weight": shape for name, shape in (
            ("q_proj", [30, 24]), ("k_proj", [10, 24]), ("v_proj", [10, 24]), ("o_proj", [24, 30]), ("q_norm", [10]),
            ("k_norm", [10]))}


def test_a_saved_file_is_what_the_safetensors_package_reads(tmp_path):
    load_file = pytest.importorskip("safetensors.torch").load_file
    save(tmp_path / "hf")
    ours = read_safetensors(tmp_path / "hf" / "model.safetensors")
    theirs = load_file(tmp_path / "hf" / "model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(w, theirs[name]) for name, w in ours.items())


def test_generation_config_ends_at_eos_and_samples_from_all_tokens(tmp_path):
    """Without top_k=0 transformers would sample from the 50 likeliest tokens; without max_length, 20 of them."""
    save(path := tmp_path / "hf")
    assert json.loads((path / "generation_config.json").read_text()) == {
        "do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_length": BLOCK,
        "bos_token_id": V - 1, "eos_token_id": V - 1, "pad_token_id": V - 1}


def test_the_tokenizer_is_written_beside_the_weights(tmp_path):
    save(path := tmp_path / "hf")
    assert json.loads((path / "tokenizer.json").read_text(encoding="utf-8")) == tokenizer_json(ENCODING)
    config = json.loads((path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast" and config["model_max_length"] == BLOCK
    assert {config[name] for name in ("bos_token", "eos_token", "pad_token")} == {"<|endoftext|>"}
    assert config["split_special_tokens"] and config["padding_side"] == "left"


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints as people hold them

def test_old_gpt2_files(tmp_path):
    """No "transformer." prefix, stored causal masks, an lm_head, half precision, dropout, n_ctx: all exist."""
    gpt = save(path := tmp_path / "hf")

    def old(read):
        read = {name.removeprefix("transformer."): w.half() for name, w in read.items()}
        read["lm_head.weight"] = read["wte.weight"].clone()
        for i in range(2):
            read[f"h.{i}.attn.bias"] = torch.ones(1, 1, BLOCK, BLOCK)
            read[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
        return read

    to_bin(path, old)
    absent = dict.fromkeys(("scale_attn_weights", "layer_norm_epsilon", "tie_word_embeddings", "n_positions"), "absent")
    set_fields(path, **absent, n_ctx=BLOCK, n_inner=96, resid_pdrop=0.1, activation_function="gelu_pytorch_tanh")
    back = from_pretrained(path)
    assert back.config == gpt.config
    assert all(torch.equal(p, q.half().float()) for p, q in zip(back.parameters(), gpt.parameters()))


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_are_read_and_a_missing_one_is_named(tmp_path, suffix):
    gpt = save(path := tmp_path / "hf", "llama untied, scaled")
    to_shards(path, suffix)
    assert same_weights(from_pretrained(path), gpt)
    next(path.glob("*-00002-of-00003*")).unlink()
    with pytest.raises(FileNotFoundError,
                       match=f"of the shards in .*index.json, .*-00002-of-00003.{suffix} are missing"):
        from_pretrained(path)


def test_a_base_models_names_have_no_prefix(tmp_path):
    gpt = save(path := tmp_path / "hf", "llama")
    change_weights(path, lambda read: {name.removeprefix("model."): w for name, w in read.items()} | {
        "layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    assert same_weights(from_pretrained(path), gpt)


def test_both_spellings_of_rope_are_read(tmp_path):
    gpt = save(path := tmp_path / "hf", "llama untied, scaled")
    fields = json.loads((path / "config.json").read_text())
    assert fields["rope_scaling"]["rope_type"] == "llama3"
    rope = fields["rope_scaling"] | {"rope_theta": fields["rope_theta"]}
    set_fields(path, rope_scaling="absent", rope_theta="absent", rope_parameters=rope)
    assert from_pretrained(path).config == gpt.config
    set_fields(path, rope_parameters="absent", rope_theta=fields["rope_theta"],
               rope_scaling={"type": rope.pop("rope_type")} | rope)
    assert from_pretrained(path).config == gpt.config


@pytest.mark.parametrize("name", ["llama", "llama untied, scaled"])
def test_tied_is_read_off_the_weights_where_the_config_does_not_say(tmp_path, name):
    gpt = save(path := tmp_path / "hf", name)
    set_fields(path, tie_word_embeddings="absent")
    assert from_pretrained(path).config.tied == gpt.config.tied


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_a_checkpoint_of_nanogpt(tmp_path, prefix, bias):
    """Its linear layers are (out, in), its lm_head is the embedding, and it pads the vocabulary to 50,304."""
    gpt, sizes = make_gpt(torch.float32, mlp="gelu_erf", bias=bias), dict(n_layer=2, n_head=3, n_embd=24)
    state = {f"{prefix}transformer.{name.replace('blocks.', 'h.')}": w for name, w in gpt.trunk.state_dict().items()}
    state[f"{prefix}lm_head.weight"] = gpt.trunk.wte.weight.detach()
    state[f"{prefix}transformer.h.0.attn.bias"] = torch.ones(1, 1, BLOCK, BLOCK)
    torch.save({"model": state, "optimizer": {}, "iter_num": 7, "best_val_loss": torch.tensor(1.0), "config": {},
                "model_args": sizes | dict(block_size=BLOCK, bias=bias, vocab_size=V, dropout=0.2)},
               tmp_path / "ckpt.pt")
    back = from_pretrained(tmp_path / "ckpt.pt")
    assert is_pretrained(tmp_path / "ckpt.pt") and back.config == gpt.config
    assert torch.equal(logits_of(back, ids(3, BLOCK)), logits_of(gpt, ids(3, BLOCK)))


def test_a_bare_file_is_a_gpt2_with_heads_of_64(tmp_path):
    gpt = make_gpt(torch.float32, n_head=2, n_embd=128)
    save_pretrained(gpt, ENCODING, tmp_path / "hf")
    back = from_pretrained(tmp_path / "hf" / "model.safetensors")
    assert back.config == gpt.config and torch.equal(back.trunk.ln_f.weight, gpt.trunk.ln_f.weight)
    for name, message in (("gpt2", "n_embd=24 is not a multiple of 64"),
                          ("llama", "no wte.weight, so it is not a GPT-2")):
        save(tmp_path / name, name)
        with pytest.raises(ValueError, match=message):
            from_pretrained(tmp_path / name / "model.safetensors")


def test_a_vocabulary_may_be_padded_and_no_more():
    def start(rows):
        return {"model_config": {"vocab_size": rows}, "tokenizer": {"n_vocab": 50_257, "name": "gpt2"}}

    for rows in (50_257, 50_258, 50_304):
        check_vocabulary("x", start(rows))
    for rows in (50_256, 51_200, 32_000):
        with pytest.raises(UserError,
                           match=f"--init_from=x has {rows:,} tokens and the tokenizer gpt2 50,257: give the"):
            check_vocabulary("x", start(rows))


# ---------------------------------------------------------------------------------------------------------------------
# what is refused

@pytest.mark.parametrize("name, fields, message", [
    ("gpt2", dict(model_type="mixtral"), "model_type='mixtral' is not supported, only gpt2, llama, qwen2, qwen3"),
    ("gpt2", dict(activation_function="relu"), "activation_function='relu' is not supported, only gelu_new"),
    ("gpt2", dict(scale_attn_weights=False), "scale_attn_weights=False is not supported, only True"),
    ("gpt2", dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx=True"),
    ("gpt2", dict(add_cross_attention=True), "add_cross_attention=True"),
    ("gpt2", dict(vocab_size="absent"), "the field 'vocab_size' is missing"),
    ("gpt2", dict(n_head=5), "is not a config.json of a GPT2LMHeadModel .n_embd=24 must be divisible by n_head=5"),
    ("llama", dict(hidden_act="gelu"), "hidden_act='gelu' is not supported, only 'silu'"),
    ("llama", dict(attention_bias=True), "attention_bias=True"), ("llama", dict(mlp_bias=True), "mlp_bias=True"),
    ("llama", dict(quantization_config={"bits": 4}), "quantization_config={'bits': 4}"),
    ("llama", dict(rope_scaling={"rope_type": "yarn", "factor": 2.0}), "rope_scaling=.*yarn.* default and llama3"),
    ("llama", dict(rope_scaling={"type": "linear", "factor": 2.0}), "rope_scaling=.*linear"),
    ("llama", dict(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4}), "rope_parameters=.*dynamic"),
    ("llama", dict(rope_scaling={"rope_type": "llama3", "factor": 8.0}),
     "rope_scaling=.* numbers for factor, low_freq"),
    ("llama", dict(num_attention_heads=5, head_dim=8), "n_head=5"),
    ("llama", dict(rms_norm_eps="absent"), "rms_norm_eps"),
    ("qwen2", dict(num_key_value_heads="absent"), "the field 'num_key_value_heads' is missing"),
    ("qwen3", dict(head_dim="absent"), "the field 'head_dim' is missing"),
    ("qwen2", dict(use_sliding_window=True, sliding_window=8), "sliding_window=8 is not supported"),
    ("qwen2", dict(layer_types=["full_attention", "sliding_attention"], sliding_window=8), "sliding_window=8")])
def test_what_the_trunk_cannot_be_is_refused_by_field(tmp_path, name, fields, message):
    save(path := tmp_path / "hf", name if name != "llama" else "llama untied, scaled")
    set_fields(path, **fields)
    with pytest.raises(ValueError, match=f"config.json.*{message}"):
        from_pretrained(path)


def test_a_window_that_is_not_used_is_no_window(tmp_path):
    save(path := tmp_path / "hf", "qwen2")
    for fields in (dict(use_sliding_window=False, sliding_window=8),
                   dict(use_sliding_window=True, sliding_window=BLOCK)):
        set_fields(path, **fields)
        from_pretrained(path)


@pytest.mark.parametrize("content, message", [("{", "config.json is not JSON"),
                                              ("[1]", "config.json is not a JSON object"),
                                              ("\xff", "config.json is not JSON"), ("{}", "model_type=None")])
def test_a_broken_config_is_refused(tmp_path, content, message):
    save(path := tmp_path / "hf")
    (path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        from_pretrained(path)


def drop(name):
    return lambda read: {n: w for n, w in read.items() if n != name}


def put(name, value):
    return lambda read: read | {name: value}


LAYER = "model.layers.1."


@pytest.mark.parametrize("name, change, message", [
    ("gpt2", drop("transformer.h.1.mlp.c_fc.bias"), r"1 weights are missing \['h.1.mlp.c_fc.bias'\], 0 have no place"),
    ("gpt2", drop("transformer.wte.weight"), r"missing \['wte.weight'\]"),
    ("gpt2", put("score.weight", torch.zeros(1, 24)), r"missing \[\], 1 have no place in it \['score.weight'\]"),
    ("gpt2", put("v_head.summary.weight", torch.zeros(1, 24)), r"no place in it \['v_head.summary.weight'\]"),
    ("gpt2", put("transformer.h.2.ln_1.weight", torch.zeros(24)), r"GPT2LMHeadModel of 2 layers.*'h.2.ln_1.weight'"),
    ("gpt2", put("transformer.wpe.weight", torch.zeros(8, 24)), r"wpe.weight .*\[8, 24\].*\[16, 24\]"),
    ("gpt2", put("transformer.h.0.mlp.c_fc.weight", torch.zeros(96, 24)), r"h.0.mlp.c_fc.*\[96, 24\].*\[24, 96\]"),
    ("gpt2", put("lm_head.weight", torch.zeros(V, 24)), "lm_head.weight differs from the token embedding"),
    ("llama", drop(LAYER + "self_attn.v_proj.weight"), r"missing \['layers.1.self_attn.v_proj.weight'\]"),
    ("llama", put(LAYER + "self_attn.v_proj.weight", torch.zeros(7, 24)), r"v_proj.weight .*\[7, 24\].*\[8, 24\]"),
    ("llama", put(LAYER + "mlp.up_proj.weight", torch.zeros(24, 20)), r"up_proj.weight .*\[24, 20\].*\[20, 24\]"),
    ("llama", put(LAYER + "self_attn.q_proj.bias", torch.zeros(24)), "no place in it .*q_proj.bias"),
    ("llama", put("lm_head.weight", torch.zeros(V, 24)), "lm_head.weight differs from the token embedding"),
    ("qwen2", drop("lm_head.weight"), r"missing \['lm_head.weight'\]"),
    ("qwen3", drop(LAYER + "self_attn.q_norm.weight"), "missing .*q_norm")])
def test_weights_must_be_exactly_those_of_the_config(tmp_path, name, change, message):
    save(path := tmp_path / "hf", name)
    change_weights(path, change)
    with pytest.raises(ValueError, match=message):
        from_pretrained(path)


def test_integers_and_other_objects_are_no_weights(tmp_path):
    for i, (change, message) in enumerate([
            (put("transformer.ln_f.weight", torch.ones(24, dtype=torch.long)), "ln_f.weight is torch.int64"),
            (put("iter", 3), "not a plain dictionary of weights"), (lambda read: [1], "not a plain dictionary")]):
        save(path := tmp_path / str(i))
        to_bin(path, change)
        with pytest.raises(ValueError, match=message):
            from_pretrained(path)


@pytest.mark.parametrize("damage", [b"", b"not a checkpoint", "half", "last byte", "header"])
@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
def test_a_damaged_file_is_named(tmp_path, file, damage):
    save(path := tmp_path / "hf")
    if file == "pytorch_model.bin":
        to_bin(path)
    whole = (path / file).read_bytes()
    cut = {"half": whole[:len(whole) // 2], "last byte": whole[:-1], "header": whole[:40]}.get(damage, damage)
    (path / file).write_bytes(cut)
    with pytest.raises(ValueError, match=f"{file} cannot be read as weights .* is it half a download"):
        from_pretrained(path)


@pytest.mark.parametrize("entry", [{"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}, {"dtype": "F32"}, 3,
                                   {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
                                   {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]},
                                   {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}])
def test_a_header_that_makes_no_sense_is_refused(tmp_path, entry):
    header = json.dumps({"x": entry}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ValueError, match="a.safetensors cannot be read as weights"):
        read_weights(tmp_path / "a.safetensors")


def test_safetensors_come_before_a_bin_beside_them(tmp_path):
    gpt = save(path := tmp_path / "hf")
    (path / "pytorch_model.bin").write_bytes(b"stale")
    assert same_weights(from_pretrained(path), gpt)


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist: give a folder.*Qwen3-0.6B"):
        from_pretrained(tmp_path / "nowhere")
    save(path := tmp_path / "hf")
    (path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="holds neither model.safetensors nor pytorch_model.bin"):
        from_pretrained(path)
    (path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        from_pretrained(path)


@pytest.mark.parametrize("damage, message", [
    (lambda path: (path / "model.safetensors").write_bytes(b"half"), "model.safetensors cannot be read as weights"),
    (lambda path: set_fields(path, mlp_bias=True), "mlp_bias=True is not supported"),
    (lambda path: (path / "tokenizer.json").unlink(), "has no tokenizer.json: give --tokenizer"),
    (lambda path: (path / "tokenizer.json").write_text(json.dumps(tokenizer_json(get_tokenizer("bytes")))),
     "has 37 tokens and the tokenizer hf 257: give the model's own")])
def test_a_run_that_cannot_start_writes_nothing(tmp_path, damage, message):
    save(path := tmp_path / "hf", "llama")
    damage(path)
    with pytest.raises((UserError, ValueError), match=message):
        train_sft.train(train_sft.Config(init_from=str(path), out_dir=str(tmp_path / "out"), device="cpu", max_iters=1))
    assert not [*(tmp_path / "out").glob("*.pt")]


def test_a_folder_is_not_overwritten(tmp_path):
    save(path := tmp_path / "hf")
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    for taken in (path, path / "config.json"):
        with pytest.raises(FileExistsError, match="not an empty folder"):
            save_pretrained(make_gpt(seed=7), ENCODING, taken)
    assert before == {p.name: p.read_bytes() for p in path.iterdir()}


@pytest.mark.parametrize("sizes", [dict(position="rope"), LLAMA.kind | dict(mlp="gelu"), LLAMA.kind | dict(bias=True),
                                   LLAMA.kind | dict(qkv_bias=True, qk_norm=True)])
def test_a_model_of_no_family_is_not_saved(tmp_path, sizes):
    with pytest.raises(ValueError, match="transformers has no model like this one"):
        save_pretrained(make_gpt(**sizes), ENCODING, tmp_path / "hf")
    assert not any(tmp_path.iterdir())


def test_a_folder_that_could_not_be_completed_leaves_nothing(tmp_path, monkeypatch):
    def full_disk(read, file):
        file.write_bytes(b"half")
        raise OSError("No space left on device")
    monkeypatch.setattr("pretrained.write_safetensors", full_disk)
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


# ---------------------------------------------------------------------------------------------------------------------
# public names

@pytest.fixture
def remote(tmp_path, monkeypatch):
    """A folder that stands for huggingface.co, at a file:// address; an empty cache beside it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(weights, "URL", (tmp_path / "remote").as_uri() + "/{name}/{file}")
    (tmp_path / "remote" / "owner").mkdir(parents=True)
    return tmp_path / "remote"


def cached(tmp_path):
    return {p.name for p in (tmp_path / "hub").rglob("*") if p.is_file()}


@pytest.mark.parametrize("form", ["whole", "shards", "bin"])
def test_a_public_name_is_downloaded_once(remote, tmp_path, form, capfd):
    gpt = save(remote / "owner" / "model", "llama")
    if form != "whole":
        (to_shards if form == "shards" else to_bin)(remote / "owner" / "model")
    (remote / "owner" / "model" / "generation_config.json").unlink()  # some models have none
    expected = {p.name for p in (remote / "owner" / "model").iterdir()}
    assert is_pretrained("owner/model") and same_weights(from_pretrained("owner/model"), gpt)
    assert "100" in capfd.readouterr().err  # torch.hub's progress bar: tqdm's, or its own where tqdm is missing
    assert cached(tmp_path) == expected
    for file in (remote / "owner" / "model").iterdir():
        file.unlink()
    assert same_weights(from_pretrained("owner/model"), gpt)  # the second time it comes from the cache
    assert get_tokenizer("owner/model").encode_ordinary("BAD") == [1, 0, 3]


def test_a_download_that_breaks_off_goes_on_where_it_ended(remote, tmp_path):
    gpt = save(remote / "gpt2")
    to_shards(remote / "gpt2")
    second = remote / "gpt2" / "model-00002-of-00003.safetensors"
    whole = second.read_bytes()
    second.unlink()
    with pytest.raises(OSError, match="could not download file://.*00002-of-00003.* give the folder"):
        from_pretrained("gpt2")
    assert "model.safetensors.index.json" not in cached(tmp_path)
    assert "model-00001-of-00003.safetensors" in cached(tmp_path)
    second.write_bytes(whole[:-100])  # a connection that closes early looks like the end of the file
    with pytest.raises(ValueError, match="00002-of-00003.safetensors cannot be read as weights"):
        from_pretrained("gpt2")
    assert second.name not in cached(tmp_path)
    second.write_bytes(whole)
    (remote / "gpt2" / "model-00001-of-00003.safetensors").unlink()  # not needed again
    assert same_weights(from_pretrained("gpt2"), gpt)


def test_a_name_that_is_nowhere(remote, tmp_path):
    with pytest.raises(OSError, match="could not download .*owner/nothing/config.json .*check the name"):
        from_pretrained("owner/nothing")
    (remote / "owner" / "empty").mkdir()
    (remote / "owner" / "empty" / "config.json").write_text("{}")
    with pytest.raises(OSError, match="holds neither model.safetensors nor pytorch_model.bin"):
        from_pretrained("owner/empty")
    assert not is_pretrained("out/sft.pt") and not is_pretrained("gpt3")


def test_a_path_that_exists_is_taken_before_a_name(remote, tmp_path):
    gpt = save(tmp_path / "gpt2-xl")
    assert same_weights(from_pretrained("gpt2-xl"), gpt)
