"""
Hugging Face's GPT-2 format: from_pretrained reads a checkpoint, save_pretrained writes one with its tokenizer.

The names of the weights, the layout of the linear layers and the fields of config.json are known here only.
"""

import json
import re
import tempfile
from pathlib import Path

import torch

from model import GPT, GPTConfig
from tokenizer import EOT, tokenizer_json

GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2")
GPT2_URL = "https://huggingface.co/{name}/resolve/main/{file}"

# model.py's trunk does these in one way only: a config.json that says otherwise is refused. Absent fields mean these.
GPT2_FIXED = dict(activation_function="gelu_new", layer_norm_epsilon=1e-5, scale_attn_weights=True,
                  scale_attn_by_inverse_layer_idx=False, add_cross_attention=False, tie_word_embeddings=True)


def from_pretrained(path_or_name):
    """A GPT with the weights of a Hugging Face GPT-2 checkpoint, in float32; dropout 0, value head 0.

    path_or_name is a folder with config.json and model.safetensors or pytorch_model.bin; or a weights
    file (.safetensors, or anything torch.load reads), whose sizes are read off the shapes, with heads of
    size 64; or one of GPT2_NAMES, downloaded once.

    Raises FileNotFoundError for a path that is not there, OSError for a failed download, ImportError for
    a safetensors file without that package, ValueError for a checkpoint that is not exactly a GPT-2."""
    path = Path(path_or_name)
    if not path.exists():
        if str(path_or_name) in GPT2_NAMES:
            return download_gpt2(str(path_or_name))
        raise FileNotFoundError(f"{path} does not exist: give a folder with config.json and "
                                "model.safetensors or pytorch_model.bin, a weights file, or one of "
                                + ", ".join(GPT2_NAMES))
    if path.is_dir():
        config = config_from_json(path / "config.json")
        file = path / "model.safetensors"  # first, as in transformers: a .bin beside it may be stale
        file = file if file.exists() else path / "pytorch_model.bin"
        if not file.exists():
            raise FileNotFoundError(f"{path} holds neither model.safetensors nor pytorch_model.bin")
        weights = read_weights(file)
    else:
        weights = read_weights(path)
        config = config_from_shapes(weights, path)

    model = GPT(config)
    names = {gpt2_name(name): p for name, p in model.trunk.named_parameters()}
    missing, unknown = sorted(names.keys() - weights.keys()), sorted(weights.keys() - names.keys())
    if missing or unknown:
        raise ValueError(f"{path} is not a GPT-2 of {config.n_layer} layers: {len(missing)} weights are "
                         f"missing {missing[:4]}, {len(unknown)} are unknown {unknown[:4]}")
    with torch.no_grad():
        for name, p in names.items():
            w, shape = weights[name], p.shape[::-1] if is_conv1d(name) else p.shape
            if w.shape != shape or not w.is_floating_point():
                raise ValueError(f"{path}: {name} is {w.dtype} of shape {list(w.shape)}, but floats "
                                 f"of shape {list(shape)} is needed")
            p.copy_(w.t() if is_conv1d(name) else w)
    return model


def save_pretrained(model, encoding, path):
    """Writes the folder `path` for transformers' AutoModelForCausalLM and AutoTokenizer: the weights, the sampling and
    the ids are those of this project. The value head is not part of that format and is left out.

    The folder appears complete or not at all. Raises ValueError for a model without biases or with fewer ids than the
    encoding, DataError if the encoding cannot be written, FileExistsError if `path` is there and no empty folder."""
    path, c = Path(path), model.config
    if not c.bias:
        raise ValueError("a model with bias=False cannot be saved as GPT-2, which has biases everywhere")
    if encoding.n_vocab > c.vocab_size:
        raise ValueError(f"the encoding has {encoding.n_vocab:,} ids and the model {c.vocab_size:,}: save it with the "
                         "encoding that it was trained with")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not an empty folder: choose another path")
    weights = {}
    for name, p in model.trunk.named_parameters():
        w = p.detach().cpu()
        name = gpt2_name(name)
        weights["transformer." + name] = w.t().contiguous() if is_conv1d(name) else w.clone()
    eos = dict(bos_token_id=encoding.eot_token, eos_token_id=encoding.eot_token)
    config = dict(model_type="gpt2", architectures=["GPT2LMHeadModel"], vocab_size=c.vocab_size,
                  n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
                  n_inner=None, embd_pdrop=c.dropout, attn_pdrop=c.dropout, resid_pdrop=c.dropout,
                  **eos, **GPT2_FIXED)
    # top_k=0, because transformers takes 50 by default, which is another distribution than the one PPO trained.
    generation = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_length=c.block_size,
                      pad_token_id=encoding.eot_token, **eos)
    # The class is named, because for a GPT-2 transformers would take one with GPT-2's own split pattern. A special
    # token's name in a text is text. Padding is on the left, where generate needs it.
    tokenizer = dict(tokenizer_class="PreTrainedTokenizerFast", model_max_length=c.block_size, bos_token=EOT,
                     eos_token=EOT, pad_token=EOT, split_special_tokens=True, padding_side="left",
                     clean_up_tokenization_spaces=False)
    contents = {"config.json": config, "generation_config.json": generation, "tokenizer_config.json": tokenizer,
                "tokenizer.json": tokenizer_json(encoding)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{path.name}.", dir=path.parent) as parent:
        folder = Path(parent) / path.name
        folder.mkdir()
        for file, fields in contents.items():
            (folder / file).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        torch.save(weights, folder / "pytorch_model.bin")
        if path.exists():
            path.rmdir()  # empty; Windows renames onto no folder
        folder.rename(path)


# ---------------------------------------------------------------------------------------------------------------------
# the format

def gpt2_name(name):
    """Our trunk's parameter name -> GPT-2's. Only the list of blocks is called differently."""
    return re.sub(r"^blocks\.", "h.", name)


def is_conv1d(name):
    """GPT-2's linear layers are Conv1D modules, which store (in, out) where nn.Linear stores (out, in)."""
    return name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


def read_weights(file):
    """GPT-2 weights by name, less their optional "transformer." prefix and whatever is not a weight."""
    if file.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError:
            raise ImportError(f"{file} needs `pip install safetensors`; a .bin file does not") from None
    try:
        if file.suffix == ".safetensors":
            weights = load_file(file)
        else:
            weights = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises anything from EOFError to RuntimeError
        raise ValueError(f"{file} cannot be read as weights ({type(error).__name__})") from error
    if not isinstance(weights, dict) or not all(isinstance(w, torch.Tensor) for w in weights.values()):
        raise ValueError(f"{file} is not a plain dictionary of weights, as GPT-2 checkpoints are")
    weights = {name.removeprefix("transformer."): w for name, w in weights.items()}
    lm_head = weights.pop("lm_head.weight", None)
    if lm_head is not None and not torch.equal(lm_head, weights.get("wte.weight", lm_head)):
        raise ValueError(f"{file}: lm_head.weight differs from wte.weight; only tied models can be loaded")
    # older checkpoints store each layer's causal mask as if it were a weight
    return {name: w for name, w in weights.items() if not name.endswith((".attn.bias", ".attn.masked_bias"))}


def config_from_json(file):
    """GPTConfig from a GPT-2 config.json. Raises ValueError naming the field for another architecture."""
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing: without it give the weights file itself")
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        if fields["model_type"] != "gpt2":
            raise ValueError(f"{file}: model_type is {fields['model_type']!r}, not 'gpt2'")
        config = GPTConfig(fields["n_positions"], fields["vocab_size"], fields["n_layer"], fields["n_head"],
                           fields["n_embd"])
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
        raise ValueError(f"{file} is not a GPT-2 config.json ({error})") from error
    except KeyError as error:
        raise ValueError(f"{file}: the field {error} is missing") from None
    for name, value in dict(GPT2_FIXED, n_inner=4 * config.n_embd).items():
        given = value if fields.get(name) is None else fields[name]
        if given != value and given != "gelu_pytorch_tanh":  # gelu_new by its other name
            raise ValueError(f"{file}: {name}={given!r} is not supported, only {value!r}")
    return config


def config_from_shapes(weights, file):
    """GPTConfig from the shapes of GPT-2 weights. Heads cannot be seen in them; OpenAI's all have size 64."""
    for name in ("wte.weight", "wpe.weight"):
        if name not in weights or weights[name].dim() != 2:
            raise ValueError(f"{file} has no {name}, so it is not a GPT-2")
    (vocab_size, n_embd), block_size = weights["wte.weight"].shape, weights["wpe.weight"].size(0)
    if n_embd % 64:
        raise ValueError(f"{file}: n_embd={n_embd} is not a multiple of 64, the head size assumed without a "
                         "config.json: give a folder that has one")
    layers = {int(name.split(".")[1]) for name in weights if re.match(r"h\.\d+\.", name)}
    return GPTConfig(block_size, vocab_size, max(layers, default=0) + 1, n_embd // 64, n_embd)


def download_gpt2(name):
    """A public GPT-2 by name from torch.hub's cache, downloaded there first if need be (0.3 to 6 GB)."""
    folder = Path(torch.hub.get_dir()) / "checkpoints" / name
    if (folder / "pytorch_model.bin").exists():
        return from_pretrained(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # A connection that closes early looks like the end of the file: only what has loaded enters the cache.
    with tempfile.TemporaryDirectory(dir=folder) as partial:
        for file in ("config.json", "pytorch_model.bin"):
            url = GPT2_URL.format(name=name, file=file)
            try:
                torch.hub.download_url_to_file(url, f"{partial}/{file}")
            except OSError as error:
                raise OSError(f"could not download {url} ({error}): check the connection, or give a folder "
                              "with config.json and pytorch_model.bin") from error
        model = from_pretrained(partial)
        for file in ("config.json", "pytorch_model.bin"):  # weights last: their presence means all is there
            (Path(partial) / file).replace(folder / file)
    return model


def is_pretrained(path_or_name):
    """Whether this names pretrained weights: a folder, a weights file, or a public name that no path has."""
    path = Path(path_or_name)
    return path.is_dir() or path.suffix in (".safetensors", ".bin") or \
        (str(path_or_name) in GPT2_NAMES and not path.exists())
