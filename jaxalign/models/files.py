"""The files of a model's folder, which a stranger may have written: JSON, safetensors, and the digests of an exported model.

What a file says of itself is checked before it is believed, and before memory is set aside for it. Every function raises OSError
where there is no file, and ValueError, one line that names the file, where it is not what it should be. No code is run.
"""

import hashlib
import json
import math
import re
from pathlib import Path

import jax
import numpy as np

from jaxalign.models.layout import Tensor, brief
from jaxalign.shard import fetch

WEIGHTS, INDEX, SEAL = "model.safetensors", "model.safetensors.index.json", "jaxalign.json"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")  # those that are read
OURS = re.compile(  # all that an export writes
    r"(config|jaxalign|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json|merges\.txt|chat_template\.jinja"
    r"|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"
)
MOST_BYTES = 16 * 2**20  # of JSON; the index of a model of 700 G weights has 9 MB
NUMBERS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def member(folder: Path, name: str) -> Path:
    """The path of a file of a folder. ValueError for a link that leads out of the folder.

    The hub's cache keeps its files in `blobs`, beside the `snapshots` that link there: that is not out.
    """
    path, home = folder / name, folder.resolve()
    if not path.is_file():
        raise OSError(f"there is no {path}: a model's folder holds config.json, {WEIGHTS} or its shards, tokenizer.json")
    homes = [home, *(above.parent / "blobs" for above in (home, *home.parents) if above.name == "snapshots")]
    if not any(path.resolve().is_relative_to(place) for place in homes):
        raise ValueError(f"{path} is a link to {path.resolve()}, out of its folder: put the file itself there to use it")
    return path


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    if (size := path.stat().st_size) > most:
        raise ValueError(f"{path} has {size} bytes; more than {most} are not read")
    return path.read_bytes()


def read_json(path: Path) -> dict:
    """The object that a JSON file holds."""
    value = _parse(read_bytes(path), f"{path} is not JSON")
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not an object")
    return value


def _parse(data: bytes, complaint: str):
    def unique(pairs):
        found = {}
        for name, value in pairs:
            if name in found:
                raise ValueError(f"the key {brief(name)} is there twice")
            found[name] = value
        return found

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{complaint}: {error}") from error


def open_folder(folder: Path) -> dict:
    """{name: Tensor} of a folder's safetensors; nothing is read yet but headers."""
    if (folder / WEIGHTS).exists():
        return open_safetensors(member(folder, WEIGHTS))
    if not (folder / INDEX).exists():
        raise OSError(f"{folder} has neither {WEIGHTS} nor {INDEX}: nothing was exported there, or pickles, which are not read")
    index = member(folder, INDEX)
    where, shards = read_json(index).get("weight_map"), {}
    if not isinstance(where, dict):
        raise ValueError(f"{index} has no object 'weight_map'")
    for name, shard in where.items():
        if not isinstance(shard, str) or not re.fullmatch(r"\w[\w.-]*\.safetensors", shard):
            raise ValueError(f"{index}: tensor {brief(name)} is said to be in {brief(shard)}, which is no file of this folder")
        if shard not in shards:
            shards[shard] = open_safetensors(member(folder, shard))
        if name not in shards[shard]:
            raise ValueError(f"{index}: tensor {brief(name)} is said to be in {shard}, but is not")
    for shard, tensors in shards.items():
        if stray := next((name for name in tensors if where.get(name, shard) != shard), None):
            raise ValueError(f"{index}: tensor {brief(stray)} is said to be in {brief(where[stray])}, and is in {shard} too")
    return {name: shards[shard][name] for name, shard in where.items()}


def open_safetensors(path: Path) -> dict:
    """{name: Tensor} of one file, mapped into memory. Its tensors must fill it from the header to the end, without overlap."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MOST_BYTES):
            raise ValueError(f"{path}: not safetensors, or cut short: a header of {length} bytes in a file of {size}")
        header = _parse(file.read(length), f"{path}: a broken safetensors header")
    if not isinstance(header, dict):
        raise ValueError(f"{path}: a broken safetensors header: it is a {type(header).__name__}")
    header.pop("__metadata__", None)
    entries = sorted((_entry(path, name, entry) for name, entry in header.items()), key=lambda entry: entry[3:])
    base, end, out = 8 + length, 0, {}
    for name, dtype, shape, start, stop in entries:
        known = dtype not in NUMBERS or stop - start == math.prod(shape) * np.dtype(NUMBERS[dtype]).itemsize
        if not known or start != end or not start <= stop <= size - base:
            raise ValueError(
                f"{path}: tensor {brief(name)} of {brief(dtype)} {brief(shape)} is said to be bytes {start} to {stop} of "
                f"{size - base}, where byte {end} is next"
            )
        out[name], end = Tensor(shape, _reader(path, name, dtype, shape, base + start)), stop
    if base + end != size:
        raise ValueError(f"{path}: the last {size - base - end} bytes belong to no tensor")
    return out


def _entry(path, name, entry):
    """-> (name, dtype, shape, first byte, end)"""
    try:
        dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: a broken safetensors header: tensor {brief(name)} is {brief(entry)}") from error
    if not isinstance(dtype, str) or len(shape) > 8 or not all(type(n) is int and 0 <= n < 2**63 for n in (*shape, start, stop)):
        raise ValueError(
            f"{path}: tensor {brief(name)} has shape {brief(shape)} of {brief(dtype)} at bytes {brief(start)} to {brief(stop)}"
        )
    return name, dtype, shape, start, stop


def _reader(path, name, dtype, shape, at):
    def read():
        if dtype not in NUMBERS:
            raise ValueError(f"{path}: tensor {brief(name)} is stored as {brief(dtype)}; {', '.join(NUMBERS)} are read")
        x = np.memmap(path, NUMBERS[dtype], "r", at, shape) if math.prod(shape) else np.zeros(shape)
        return (x.astype("<u4") << 16).view("<f4") if dtype == "BF16" else x.astype(np.float32)

    return read


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(tree) -> str:
    """Sixteen hexadecimal digits that tell this tree of arrays from others."""
    total = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        total.update(jax.tree_util.keystr(path).encode())
        total.update(np.ascontiguousarray(fetch(leaf)))
    return total.hexdigest()[:16]


def seal(folder: Path, **more):
    """Write the sha256 of every file of a folder beside them, and what more there is to say."""
    digests = {path.name: sha256(path) for path in sorted(folder.iterdir())}
    (folder / SEAL).write_text(json.dumps({"sha256": digests, **more}, indent=2))


def check_seal(folder: Path, *, weights: bool):
    """ValueError, naming the file, where an exported folder is not as it was written. A folder without a seal passes.

    It finds what a disk, a copy or an edit did, not one who writes the seal anew.
    Args: weights: the files of weights too, which are most of the bytes.
    """
    if not (folder / SEAL).exists():
        return
    digests = read_json(member(folder, SEAL)).get("sha256")
    if not isinstance(digests, dict) or not all(OURS.fullmatch(name) for name in digests):
        raise ValueError(f"{folder / SEAL} has no object 'sha256' of an exported model's files")
    there = {path.name for path in folder.iterdir() if OURS.fullmatch(path.name)} - {SEAL}
    for name in sorted(there | digests.keys()):
        if name.endswith(".safetensors") and not weights:
            continue
        if name not in digests or sha256(member(folder, name)) != digests[name]:
            raise ValueError(
                f"{folder / name} is not as it was exported: its sha256 is not the one in {SEAL}. Export or copy the model again; "
                f"or, if the change is meant, delete {SEAL}"
            )
