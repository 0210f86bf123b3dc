"""
Files of weights as Hugging Face has them: safetensors and .bin, whole or in shards, and their download by name.

They are read with torch alone. A tensor in safetensors, or in a .bin that is a zip file, is memory-mapped, not copied.
"""

import json
import math
import mmap
import re
import tempfile
import zipfile
from pathlib import Path

import torch

URL = "https://huggingface.co/{name}/resolve/main/{file}"
BESIDE = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")  # if they exist
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # in this order, as in transformers: a .bin beside it may be stale


def read_json(file, why=""):
    """The dict in a JSON file. Raises FileNotFoundError and ValueError."""
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing{why and ': ' + why}")
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not JSON ({error}): is it half a download?") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{file} is not a JSON object")
    return fields


def weight_files(folder):
    """The files of a folder's weights. Raises FileNotFoundError naming what is missing."""
    for name in WEIGHTS:
        if (folder / name).exists():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.exists():
            shards = sorted(set(read_json(index).get("weight_map", {}).values()))
            missing = [shard for shard in shards if not (folder / shard).exists()]
            if missing or not shards:
                raise FileNotFoundError(f"{folder}: of the shards in {index.name}, {', '.join(missing) or 'all'} are "
                                        "missing: fetch them again")
            return [folder / shard for shard in shards]
    raise FileNotFoundError(f"{folder} holds neither {' nor '.join(WEIGHTS)}")


def read_folder(folder):
    """{name: tensor} of a folder's weights, all shards together."""
    return {name: w for file in weight_files(folder) for name, w in read_weights(file).items()}


def names_in(folder):
    """The names of a folder's weights."""
    return {name for file in weight_files(folder) for name in read_weights(file)}


def read_weights(file):
    """{name: tensor} of a weights file. The tensors are mapped: reading a tensor reads the disk. Raises ValueError."""
    try:
        if file.suffix == ".safetensors":
            return read_safetensors(file)
        weights = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file) or None)
    except Exception as error:  # a damaged file raises anything from EOFError to RuntimeError
        raise ValueError(f"{file} cannot be read as weights ({type(error).__name__}): is it half a "
                         "download?") from error
    if not isinstance(weights, dict) or not all(isinstance(w, torch.Tensor) for w in weights.values()):
        raise ValueError(f"{file} is not a plain dictionary of weights")
    return weights


def read_safetensors(file):
    """Reads 8 bytes with the length n of the header, n bytes of JSON, then the bytes of the tensors at the header's
    offsets [the format of huggingface/safetensors]. Raises ValueError if the file does not hold all of them."""
    weights, size = {}, file.stat().st_size
    with open(file, "rb") as opened:
        start = 8 + int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(max(0, min(start, size) - 8)))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            (begin, end), dtype, shape = entry["data_offsets"], DTYPES[entry["dtype"]], entry["shape"]
            if not 0 <= begin <= end <= size - start or end - begin != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name} does not fit")
            # Each tensor has its own mapping, which is freed with it
            skip = (start + begin) % mmap.ALLOCATIONGRANULARITY
            raw = mmap.mmap(opened.fileno(), skip + end - begin, access=mmap.ACCESS_COPY,
                            offset=start + begin - skip) if end > begin else b""
            flat = torch.frombuffer(raw, dtype=torch.uint8, offset=skip) if raw else torch.empty(0, dtype=torch.uint8)
            weights[name] = flat.view(dtype).view(shape)
    return weights


def write_safetensors(weights, file):
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, w in weights.items():
        header[name] = {"dtype": "F32", "shape": list(w.shape), "data_offsets": [offset, offset + 4 * w.numel()]}
        offset += 4 * w.numel()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    with open(file, "wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for w in weights.values():
            opened.write(w.float().cpu().contiguous().numpy().data)


def is_nanogpt(path):
    """Whether a file is a checkpoint of nanoGPT's train.py."""
    if Path(path).suffix != ".pt" or not zipfile.is_zipfile(path):
        return False
    try:
        return {"model", "model_args"} <= set(torch.load(path, map_location="meta", weights_only=True))
    except Exception:  # the reader of checkpoints will say what is wrong with it
        return False


# ---------------------------------------------------------------------------------------------------------------------
# public names

GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2")


def is_public_name(path_or_name):
    """Whether this can be a name on Hugging Face's hub: a GPT-2's, or owner/model that is not a path to a file."""
    name = str(path_or_name)
    return name in GPT2_NAMES or bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name)) and not re.search(
        r"\.(pt|bin|safetensors|json)$", name)


def download(name, folder):
    """Downloads the files of a public model that `folder` lacks. Each is moved into place once it is complete, so that
    a second call continues where the first one ended. The list of shards comes last."""
    folder.mkdir(parents=True, exist_ok=True)
    if any((folder / file).exists() for file in (*WEIGHTS, *(f"{file}.index.json" for file in WEIGHTS))):
        return

    with tempfile.TemporaryDirectory(dir=folder) as partial:
        def fetch(file, optional=False):
            """Path of a complete file, downloaded if needed; None for an optional one that the model does not have."""
            if (folder / file).exists():
                return folder / file
            url, part = URL.format(name=name, file=file), Path(partial) / file
            try:
                torch.hub.download_url_to_file(url, str(part))
            except OSError as error:
                if optional and (getattr(error, "code", None) == 404 or isinstance(getattr(error, "reason", None),
                                                                                   FileNotFoundError)):
                    return None
                raise OSError(f"could not download {url} ({error}): check the name and the connection; for "
                              "a model with a licence to accept, give the folder that you downloaded") from error
            # A connection that closes early looks like the end of the file: only what can be read enters the cache.
            if part.suffix in (".safetensors", ".bin"):
                read_weights(part)
            elif part.suffix == ".json":
                read_json(part)
            return part.replace(folder / file) if not file.endswith(".index.json") else part

        fetch("config.json")
        for file in BESIDE:
            fetch(file, optional=True)
        for file in WEIGHTS:
            if fetch(file, optional=True):
                return
            index = fetch(f"{file}.index.json", optional=True)
            if index:
                for shard in sorted(set(read_json(index)["weight_map"].values())):
                    fetch(shard)
                index.replace(folder / index.name)
                return
    raise OSError(f"{URL.format(name=name, file='')} holds neither {' nor '.join(WEIGHTS)}")
