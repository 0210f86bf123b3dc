"""
Hugging Face's formats: from_pretrained reads a GPT-2, Llama, Qwen2 or Qwen3 checkpoint, save_pretrained writes one
with its tokenizer.

Only this file holds the names of weights and of config.json's fields: one table per family, for reading and writing.
A config.json that asks for something model.py's trunk cannot do is refused with the name of the field.
"""

import json
import re
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from model import GPT, GPTConfig
from support.weights import (WEIGHTS, download, is_nanogpt, is_public_name, names_in, read_folder, read_json,
                             read_weights, write_safetensors)
from tokenizer import PretrainedEncoding, eos_ids, hub_folder, tokenizer_json

# ---------------------------------------------------------------------------------------------------------------------
# the families


@dataclass(frozen=True)
class Family:
    architecture: str  # transformers' class
    kind: dict         # GPTConfig fields that all models of the family share
    fields: dict       # GPTConfig field -> field of config.json
    optional: tuple    # those of `fields` that a config.json may lack
    fixed: dict        # fields of config.json that must have this value, or be absent
    prefix: str        # in front of all weight names except lm_head's; some files leave it out
    names: dict        # our module -> theirs; several of theirs are stacked by rows in one of ours


GPT2 = Family(
    "GPT2LMHeadModel", {},
    dict(block_size="n_positions", vocab_size="vocab_size", n_layer="n_layer", n_head="n_head", n_embd="n_embd",
         mlp_dim="n_inner", norm_eps="layer_norm_epsilon", tied="tie_word_embeddings"),
    ("mlp_dim", "norm_eps", "tied"),
    dict(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False),
    "transformer.",
    {name: (name,) for name in ("wte", "wpe", "ln_f")} | {f"blocks.{{}}.{part}": (f"h.{{}}.{part}",) for part in (
        "ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")})

LLAMA = Family(
    "LlamaForCausalLM", dict(norm="rms", position="rope", mlp="swiglu", bias=False),
    dict(block_size="max_position_embeddings", vocab_size="vocab_size", n_layer="num_hidden_layers",
         n_head="num_attention_heads", n_embd="hidden_size", n_kv_head="num_key_value_heads", head_dim="head_dim",
         mlp_dim="intermediate_size", norm_eps="rms_norm_eps", tied="tie_word_embeddings"),
    ("n_kv_head", "head_dim", "tied"),
    dict(hidden_act="silu", attention_bias=False, mlp_bias=False, partial_rotary_factor=1.0, quantization_config=None),
    "model.",
    {"wte": ("embed_tokens",), "ln_f": ("norm",)} | {f"blocks.{{}}.{part}": tuple(
        f"layers.{{}}.{name}" for name in names.split()) for part, names in {
            "ln_1": "input_layernorm", "ln_2": "post_attention_layernorm",
            "attn.c_attn": "self_attn.q_proj self_attn.k_proj self_attn.v_proj", "attn.c_proj": "self_attn.o_proj",
            "attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm",
            "mlp.c_fc": "mlp.gate_proj mlp.up_proj", "mlp.c_proj": "mlp.down_proj"}.items()})

# If a Qwen config.json lacks the number of key heads or (Qwen3) their size, transformers has other defaults than ours.
QWEN2 = replace(LLAMA, architecture="Qwen2ForCausalLM", kind=LLAMA.kind | dict(qkv_bias=True),
                optional=("head_dim", "tied"))
QWEN3 = replace(LLAMA, architecture="Qwen3ForCausalLM", kind=LLAMA.kind | dict(qk_norm=True), optional=("tied",))
FAMILIES = {"gpt2": GPT2, "llama": LLAMA, "qwen2": QWEN2, "qwen3": QWEN3}

GELU = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu": "gelu_erf"}  # activation_function of a GPT-2
LLAMA3_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def family_of(config):
    """The model_type of a GPTConfig."""
    return "gpt2" if config.position == "learned" else "qwen3" if config.qk_norm else \
        "qwen2" if config.qkv_bias else "llama"


def tensors(model, names, conv1d=True):
    """Yields (name, tensor) for each weight of a GPT except the value head's, in the layout of the family's files. The
    tensors are views of the parameters: reading copies into them, writing copies out of them."""
    c = model.config
    rows = {"c_attn": [c.n_head * c.head_dim] + 2 * [c.n_kv_head * c.head_dim], "c_fc": 2 * [c.mlp_dim]}
    for ours, p in model.named_parameters():
        if ours.startswith("value_head."):
            continue
        module, kind = ours.removeprefix("trunk.").rsplit(".", 1)
        layer = re.search(r"\.(\d+)\.", module)
        theirs = names.get(re.sub(r"\.\d+\.", ".{}.", module), (module,))
        parts = p.detach().split(rows[module.rsplit(".", 1)[1]]) if len(theirs) > 1 else [p.detach()]
        for name, part in zip(theirs, parts):
            # GPT-2's linear layers are Conv1D modules, which store (in, out) where nn.Linear stores (out, in)
            transposed = conv1d and theirs[0].startswith("h.") and part.dim() == 2
            yield f"{name.format(layer and layer[1])}.{kind}", part.t() if transposed else part


# ---------------------------------------------------------------------------------------------------------------------
# reading

def from_pretrained(path_or_name):
    """A GPT with the weights of a pretrained language model, in float32; dropout 0, value head 0.

    path_or_name is a folder as transformers writes it (config.json; model.safetensors or pytorch_model.bin, whole or in
    shards); a GPT-2 weights file (.safetensors, .bin), whose sizes are read off the shapes, with heads of size 64; a
    ckpt.pt of nanoGPT; or a public name such as gpt2 or Qwen/Qwen3-0.6B, downloaded once.

    Raises FileNotFoundError for a missing file, OSError for a failed download, ValueError for a checkpoint that is
    not exactly a model of one of FAMILIES."""
    path = local_path(path_or_name)
    if is_nanogpt(path):
        return fill(*read_nanogpt(path), path, conv1d=False)
    return fill(config_of(path), read_folder(path) if path.is_dir() else read_weights(path), path)


def config_of(path):
    """The GPTConfig of a checkpoint, without its weights."""
    if is_nanogpt(path):
        return read_nanogpt(path)[0]
    return read_config(path) if path.is_dir() else config_from_shapes(read_weights(path), path)


def local_path(path_or_name):
    """The path of a checkpoint. A public name is downloaded to torch.hub's cache, unless it is there already."""
    path = Path(path_or_name)
    if path.exists():
        return path
    if is_public_name(path_or_name):
        download(str(path_or_name), hub_folder(path_or_name))
        return hub_folder(path_or_name)
    raise FileNotFoundError(f"{path} does not exist: give a folder with config.json and weights, a weights file, or a "
                            "public name such as gpt2 or Qwen/Qwen3-0.6B")


def is_pretrained(path_or_name):
    """Whether this names pretrained weights: a folder, a weights file, nanoGPT's ckpt.pt, or a public name."""
    path = Path(path_or_name)
    return path.is_dir() or path.suffix in (".safetensors", ".bin") or is_nanogpt(path) or \
        not path.exists() and is_public_name(path_or_name)


def fill(config, weights, path, conv1d=True):
    """A GPT of `config` with weights {name: tensor}. Raises ValueError if one is missing, unknown or does not fit."""
    family = FAMILIES[family_of(config)]
    # Remove the prefixes of torch.compile and of the family, and buffers that some files store among the weights
    weights = {name.removeprefix("_orig_mod.").removeprefix(family.prefix): w for name, w in weights.items()}
    weights = {name: w for name, w in weights.items()
               if not name.endswith((".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq"))}
    if config.tied and "lm_head.weight" in weights:
        head = weights.pop("lm_head.weight")
        if not torch.equal(head, weights.get(family.names["wte"][0] + ".weight", head[:0])):
            raise ValueError(f"{path}: lm_head.weight differs from the token embedding, but config.json's "
                             "tie_word_embeddings, true or absent, says that they are the same")
    with torch.device("meta"):  # random weights would be overwritten, and take longer to make than to read
        model = GPT(config)
    model = model.to_empty(device="cpu")
    for p in model.value_head.parameters():
        torch.nn.init.zeros_(p)
    places = dict(tensors(model, family.names, conv1d))
    missing, unknown = sorted(places.keys() - weights.keys()), sorted(weights.keys() - places.keys())
    if missing or unknown:
        raise ValueError(f"{path} is not a {family.architecture} of {config.n_layer} layers: {len(missing)} weights "
                         f"are missing {missing[:4]}, {len(unknown)} have no place in it {unknown[:4]}")
    for name, place in places.items():
        w = weights.pop(name)  # popped, to free the memory of its part of the file
        if w.shape != place.shape or not w.is_floating_point():
            raise ValueError(f"{path}: {name} is {w.dtype} of shape {list(w.shape)}, but floats of shape "
                             f"{list(place.shape)} are needed")
        place.copy_(w)
    return model


def read_config(folder):
    """GPTConfig from a folder's config.json. Raises ValueError naming a field that the trunk does not support."""
    file = folder / "config.json"
    fields = read_json(file, "without it the kind of model is unknown")
    family = FAMILIES.get(fields.get("model_type"))

    def refuse_unless(fits, name, known):
        if not fits:
            raise ValueError(f"{file}: {name}={fields.get(name)!r} is not supported, only {known}")

    refuse_unless(family, "model_type", ", ".join(FAMILIES))
    fields.setdefault("n_positions", fields.get("n_ctx"))  # GPT-2's older name for it
    sizes = {}
    for ours, theirs in family.fields.items():
        if fields.get(theirs) is not None:
            sizes[ours] = fields[theirs]
        elif ours not in family.optional:
            raise ValueError(f"{file}: the field {theirs!r} is missing")
    for name, value in family.fixed.items():
        refuse_unless(fields.get(name) in (None, value), name, repr(value))
    if family is GPT2:
        activation = fields.get("activation_function") or "gelu_new"
        refuse_unless(activation in GELU, "activation_function", ", ".join(GELU))
        sizes["mlp"] = GELU[activation]
    else:
        slides = set(fields.get("layer_types") or []) - {"full_attention"} or fields.get("use_sliding_window")
        refuse_unless(not slides or (fields.get("sliding_window") or 0) >= sizes["block_size"], "sliding_window",
                      "one as long as max_position_embeddings")
        # transformers 5 writes rope_parameters; earlier versions wrote rope_theta and rope_scaling
        rope = fields.get("rope_parameters") or {"rope_theta": fields.get("rope_theta")} | (
            fields.get("rope_scaling") or {})
        kind = rope.get("rope_type", rope.get("type", "default"))
        refuse_unless(kind in ("default", "llama3"), "rope_parameters" if "rope_parameters" in fields else
                      "rope_scaling", "the kinds default and llama3")
        sizes["rope_base"] = float(rope.get("rope_theta") or 10_000.0)
        if kind == "llama3":
            refuse_unless(all(type(rope.get(name)) in (int, float) for name in LLAMA3_SCALING), "rope_scaling",
                          "numbers for " + ", ".join(LLAMA3_SCALING))
            sizes["rope_scaling"] = tuple(rope[name] for name in LLAMA3_SCALING)
    try:
        config = GPTConfig(**family.kind | sizes)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} is not a config.json of a {family.architecture} ({error})") from error
    # Without the field, a GPT-2 is tied, and any other model is tied unless its files have an lm_head
    if "tied" in sizes:
        return config
    return replace(config, tied=family is GPT2 or "lm_head.weight" not in names_in(folder))


def config_from_shapes(weights, file):
    """GPTConfig from the shapes of GPT-2 weights. They do not show the head size; OpenAI's is always 64."""
    shapes = {name.removeprefix(GPT2.prefix): w.shape for name, w in weights.items()}
    for name in ("wte.weight", "wpe.weight"):
        if len(shapes.get(name, ())) != 2:
            raise ValueError(f"{file} has no {name}, so it is not a GPT-2: give a folder with config.json")
    (vocab_size, n_embd), (block_size, _) = shapes["wte.weight"], shapes["wpe.weight"]
    if n_embd % 64:
        raise ValueError(f"{file}: n_embd={n_embd} is not a multiple of 64, the head size assumed without a "
                         "config.json: give a folder that has one")
    layers = {int(name.split(".")[1]) for name in shapes if re.match(r"h\.\d+\.", name)}
    return GPTConfig(block_size, vocab_size, max(layers, default=0) + 1, n_embd // 64, n_embd)


def read_nanogpt(path):
    """(GPTConfig, weights) of a ckpt.pt. nanoGPT has had the exact GELU since 2023."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    try:
        return GPTConfig(**checkpoint["model_args"] | dict(dropout=0.0, mlp="gelu_erf")), checkpoint["model"]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: model_args are not those of nanoGPT ({error})") from error


# ---------------------------------------------------------------------------------------------------------------------
# writing

def save_pretrained(model, encoding, path):
    """Writes the folder `path` for transformers' AutoModelForCausalLM and AutoTokenizer: float32 weights, and
    the same sampling and ids as in this project. The value head is not part of that format and is left out.

    The folder appears complete or not at all. Raises ValueError for a model of no family or with fewer ids than the
    encoding, DataError if that cannot be written, FileExistsError if `path` exists and is not an empty folder."""
    path, c = Path(path), replace(model.config, dropout=0.0)
    family = FAMILIES[name := family_of(c)]
    if name == "gpt2" and not c.bias:  # transformers' GPT-2 has biases everywhere: add zeros
        c, without = replace(c, bias=True), model
        model = GPT(c)
        model.load_state_dict(without.state_dict(), strict=False)
    if encoding.n_vocab > c.vocab_size:
        raise ValueError(f"the encoding has {encoding.n_vocab:,} ids and the model {c.vocab_size:,}: save it with the "
                         "encoding that it was trained with")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not an empty folder: choose another path")

    eos, text = eos_ids(encoding), lambda token: token if token is None else encoding.decode([token])
    pretrained = isinstance(encoding, PretrainedEncoding)
    bos, pad = (encoding.bos, encoding.pad) if pretrained else (eos[0], None)
    pad = eos[0] if pad is None else pad
    special = dict(bos_token_id=bos, eos_token_id=eos if len(eos) > 1 else eos[0], pad_token_id=pad)
    config = dict(model_type=name, architectures=[family.architecture], torch_dtype="float32", **special,
                  **family.fixed, **{theirs: getattr(c, ours) for ours, theirs in family.fields.items()})
    if family is GPT2:
        config |= dict(activation_function={ours: theirs for theirs, ours in GELU.items()}[c.mlp], attn_pdrop=0.0,
                       embd_pdrop=0.0, resid_pdrop=0.0)
    else:  # the older spelling, which every version of transformers reads
        scaling = c.rope_scaling and dict(zip(LLAMA3_SCALING, c.rope_scaling), rope_type="llama3")
        config |= dict(rope_theta=c.rope_base, rope_scaling=scaling, use_sliding_window=False)
    # top_k=0, because transformers' default of 50 samples from another distribution than the one PPO trained.
    generation = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_length=c.block_size, **special)
    # The class is named, because transformers' default for a GPT-2 uses GPT-2's own split pattern. A special token's
    # name in a text is ordinary text, except in a chat template's output. generate needs padding on the left.
    chat_template = encoding.chat_template if pretrained else None
    tokenizer = dict(tokenizer_class="PreTrainedTokenizerFast", model_max_length=c.block_size, bos_token=text(bos),
                     eos_token=text(eos[0]), pad_token=text(pad), split_special_tokens=not chat_template,
                     padding_side="left", clean_up_tokenization_spaces=False)
    tokenizer |= {"chat_template": chat_template} if chat_template else {}
    contents = {"config.json": config, "generation_config.json": generation, "tokenizer_config.json": tokenizer,
                "tokenizer.json": tokenizer_json(encoding)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{path.name}.", dir=path.parent) as parent:
        folder = Path(parent) / path.name
        folder.mkdir()
        for file, fields in contents.items():
            (folder / file).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        if read_config(folder) != c:
            raise ValueError(f"transformers has no model like this one: {c}")
        write_safetensors({(name if name.startswith("lm_head") else family.prefix + name): w
                           for name, w in tensors(model, family.names)}, folder / WEIGHTS[0])
        if path.exists():
            path.rmdir()  # it is empty, and Windows cannot rename onto a folder
        folder.rename(path)
