"""Adapters from and to folders as PEFT has them: adapter_config.json and adapter_model.safetensors. LoRA, rsLoRA, (IA)3, prefix and
prompt tuning, with a scalar head beside LoRA and (IA)3.

Where PEFT sees one dense layer in what are several here (GPT-2's c_attn is q, k and v), its A serves each of them. Out again, the
A's are stacked and the B's fill the blocks of a diagonal: the same numbers by the sum of their ranks, as rank_pattern says.
"""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from safetensors.numpy import save_file

from jaxalign.models import Config, files, layout
from jaxalign.models.layout import brief, family_for
from jaxalign.models.parts import ADDED, AT_INPUT, Adapter
from jaxalign.shard import fetch, unbox
from jaxalign.types import join

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
TYPES = {"LORA": "lora", "IA3": "ia3", "PREFIX_TUNING": "prefix", "PROMPT_TUNING": "prompt"}
KNOWN = {  # what some keys may say, or each entry of them; other ways to begin change the plain model, too
    "init_lora_weights": (None, True, False, "gaussian", "orthogonal", "eva"),
    "modules_to_save": (None, "score", "classifier"),  # the names that PEFT gives to a scalar head, of which a model has one
}
READ = {*KNOWN, "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "num_virtual_tokens"}
TOLD = {  # what does not change the numbers of an adapter that has been trained, or shows in the tensors that there are
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version", "runtime_config"),
    *("init_ia3_weights", "init_weights", "lora_dropout", "fan_in_fan_out", "megatron_core"),
    *("target_modules", "exclude_modules", "feedforward_modules", "layers_to_transform", "layers_pattern", "qalora_group_size"),
    *("token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules", "encoder_hidden_size", "prefix_projection"),
    *("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"),
}


def export(folder, config: Config, params, *, family: str | None = None, base: str | None = None) -> Path:
    """Write the adapter of a model as PEFT reads it, in float32. Inverse of `load`.

    Beside them stands jaxalign.json: the sha256 of both files, and a digest of the model below, which `load` compares.

    Every process of a run calls this, the first one writes.
    Args:
        params: the model's whole tree, boxed or not, wherever its arrays live.
        family: key of names.FAMILIES; None for the first that can say this config.
        base: where the plain model is, for adapter_config.json.
    Raises ValueError for what PEFT cannot say; FileExistsError where the folder holds other files.
    """
    folder, adapter, plain = Path(folder), config.adapter, replace(config, adapter=None)
    if adapter is None or adapter.kind not in TYPES.values():
        raise ValueError(f"PEFT has no adapter such as {adapter}: export the merged model (models.adapters.merge)")
    kind, flat = family or layout.family_of(plain), layout.flatten(fetch(unbox(params)))
    said = {name: their for their, name in TYPES.items()}[adapter.kind]
    task = "SEQ_CLS" if config.scalar is not None else "SEQ_2_SEQ_LM" if kind == "t5" else "CAUSAL_LM"
    raw = {"peft_type": said, "task_type": task, "base_model_name_or_path": base, "inference_mode": True}
    if adapter.virtual:
        _refuse_virtual(folder, config)
        raw |= {"num_virtual_tokens": adapter.length, "num_layers": config.layers, "num_transformer_submodules": 1}
        if adapter.kind == "prefix":
            pair = np.stack([flat["prefix.k"], flat["prefix.v"]], axis=1)  # [L,2,P,G,K]
            tensors = {"prompt_embeddings": pair.transpose(2, 0, 1, 3, 4).reshape(adapter.length, -1)}
            raw |= {"token_dim": config.kv_heads * config.head_dim, "num_attention_heads": config.kv_heads}
        else:
            tensors = {"prompt_embeddings": flat["prompt.tokens"]}
            raw |= {"token_dim": config.width, "num_attention_heads": config.heads}
    else:
        tensors, about = _of_dense(adapter, plain, kind, flat)
        raw |= about
    if config.scalar is not None:
        raw["modules_to_save"] = ["score"]
        tensors[f"{PREFIX}score.weight"] = flat["scalar.kernel"][None]
        if flat["scalar.bias"]:  # transformers has none
            tensors[f"{PREFIX}score.bias"] = flat["scalar.bias"][None]
    if jax.process_index() == 0:
        _write(folder, raw, tensors, _digest_below(flat))
    return folder


def base_of(folder) -> str:
    """The source of the model below the adapter of a folder, as adapter_config.json names it. ValueError where it names none."""
    base = files.read_json(files.member(Path(folder), CONFIG)).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(f"{folder}: base_model_name_or_path is {brief(base)}; say the model below this adapter as {folder}@MODEL")
    return base


def load(folder, config: Config, params, *, family: str | None = None):
    """A plain model with the adapter of a folder. -> (config, params): the adapter's leaves are float32 NumPy, the others as given

    Its rank is the largest of rank_pattern; layers of a smaller one get zeros, and what alpha_pattern says goes into their B.
    Args: folder: PEFT's, or a run's, whose folder `adapter` is meant.
    Raises ValueError, one line that names the file, for what our adapters do not compute, and for another model than the one that
    the adapter was trained on; OSError where there is no file.
    """
    folder, kind = Path(folder), family or layout.family_of(config)
    if config.adapter:
        raise ValueError(f"{folder}: the model below has an adapter already, a {config.adapter.kind} that cannot be merged")
    if not (folder / CONFIG).exists():
        folder = folder / "adapter"
    if not (folder / CONFIG).exists():
        raise OSError(f"there is no adapter in {folder.parent}: no {CONFIG} there, nor in its folder `adapter`")
    _check_seal(folder, params)
    where, raw = folder / CONFIG, files.read_json(files.member(folder, CONFIG))
    tensors = files.open_safetensors(files.member(folder, WEIGHTS))
    if raw.get("peft_type") not in TYPES:
        raise ValueError(f"{where}: peft_type {brief(raw.get('peft_type'))} is not among {', '.join(TYPES)}")
    for key in raw.keys() - READ - TOLD:
        if raw[key] not in (None, False, {}, [], "none", ""):
            raise ValueError(f"{where}: {key} = {brief(raw[key])} asks for something that no adapter here computes")
    for key, known in KNOWN.items():
        if not all(value in known for value in (raw[key] if isinstance(raw.get(key), list) else [raw.get(key)])):
            raise ValueError(f"{where}: {key} = {brief(raw[key])}; known are {known}")
    scalar = {name: tensors.pop(f"{PREFIX}score.{theirs}", None) for name, theirs in (("kernel", "weight"), ("bias", "bias"))}
    if TYPES[raw["peft_type"]] in ("prefix", "prompt"):
        adapter, flat = _virtual(config, raw, tensors, folder)
    else:
        adapter, flat = _read_dense(config, kind, raw, tensors, folder)
    if scalar["kernel"] is not None:
        for name, shape in (("kernel", (1, config.width)), ("bias", (1,))):
            if scalar[name] is not None and scalar[name].shape != shape:
                raise ValueError(f"{folder / WEIGHTS}: the {name} of score has shape {scalar[name].shape}, not {shape}")
        flat["scalar.kernel"] = np.array(scalar["kernel"].read()[0])
        flat["scalar.bias"] = np.zeros((), np.float32) if scalar["bias"] is None else scalar["bias"].read().reshape(())
        config = replace(config, scalar=1 / math.sqrt(config.width + 1) if config.scalar is None else config.scalar)
    return replace(config, adapter=adapter), join(params, layout.nest(flat))


# ---------------------------------------------------------------- tokens before a document


def _refuse_virtual(folder, config):
    if config.windows:
        raise ValueError(
            f"{folder}: virtual tokens pass out of sight of a sliding window in PEFT, not here, and this model has some"
        )
    if config.scalar is not None:
        raise ValueError(f"{folder}: PEFT's form of virtual tokens with a scalar head is not known here")


def _virtual(config, raw, tensors, folder):
    _refuse_virtual(folder, replace(config, scalar=None))  # the model's own head is none of PEFT's
    kind, tensor = TYPES[raw["peft_type"]], tensors.pop("prompt_embeddings", None)
    length, wide = raw.get("num_virtual_tokens"), config.layers * 2 * config.kv_heads * config.head_dim
    wanted = (length, wide if kind == "prefix" else config.width)
    if tensor is None or tensors or tensor.shape != wanted or type(length) is not int or length < 1:
        found = None if tensor is None else tensor.shape
        raise ValueError(
            f"{folder / WEIGHTS}: prompt_embeddings of shape {found} and {len(tensors)} more, not {wanted} and no more"
        )
    adapter, x = Adapter(kind, length=length), np.array(tensor.read())
    if kind == "prompt":
        return adapter, {"prompt.tokens": x}
    x = x.reshape(length, config.layers, 2, config.kv_heads, config.head_dim).transpose(2, 1, 0, 3, 4)
    return adapter, {"prefix.k": x[0], "prefix.v": x[1]}


# ---------------------------------------------------------------- LoRA and (IA)3, dense layer by dense layer


class _Dense(NamedTuple):
    """A dense layer that PEFT sees, of tensors A [r,in] and B [out,r], and those of ours that it holds."""

    name: str
    pattern: str  # regular expression for its name in any layer
    layer: int
    ours: list
    shapes: list  # of the output of each of ours
    sizes: dict
    a: str  # layout of A
    b: str  # layout of B
    conv1d: bool  # its weight is [in,out]

    def a_of(self, x, rank: int, *, back: bool = False):
        return layout.rearrange(x, self.a, self.sizes | {"r": rank}, back=back)

    def parts_of(self, x, rank: int):
        """B as [r,...] of each of ours."""
        return layout.split(x, self.b, self.sizes | {"r": rank})

    def whole_of(self, parts, rank: int):
        return np.ascontiguousarray(layout.join(parts, self.b, self.sizes | {"r": rank}))

    @property
    def in_out(self):
        return layout.shape_of(self.a.split("->")[0], self.sizes | {"r": 1})[1], sum(map(math.prod, self.shapes))

    @property
    def at_input(self) -> bool:
        return self.ours[0].endswith(AT_INPUT)


def _dense_layers(config, kind):
    for name, _, layer, (row, spelled, *leaves), sizes in layout.plan(family_for(kind, config).rows, config):
        if layer is None or not leaves[0].endswith(".kernel"):
            continue
        contract, lasts, shapes = 2 if leaves[0].endswith(".o.kernel") else 1, [], []
        for theirs, ours in (part.split("->") for part in spelled.split("+")):
            axes = re.findall(r"[^\WN]", ours)
            groups = re.findall(r"\([^)]*\)|\w", theirs)
            into, out = sorted(groups, key=lambda group: axes[0] not in group)
            lasts.append(f"{out} r -> {'N ' if 'N' in ours else ''}r {' '.join(axes[contract:])}")
            shapes.append(tuple(sizes[axis] for axis in axes[contract:]))
        first, denses = f"r {into} -> {' '.join(axes[:contract])} r", [leaf.removesuffix(".kernel") for leaf in leaves]
        shapes = shapes * len(denses) if len(shapes) == 1 else shapes
        pattern = re.escape(row.removesuffix(".weight")).replace(r"\{\}", r"\d+")
        yield _Dense(name.removesuffix(".weight"), pattern, layer, denses, shapes, sizes, first, "+".join(lasts), groups[0] == into)


def _written(adapter, dense: _Dense, flat):
    """-> {part of PEFT's name: tensor} of a dense layer, and its rank; ({}, 0) where the adapter is not on it."""
    leaf, layer, rank = "lora_b" if adapter.kind == "lora" else "ia3", dense.layer, adapter.rank
    own = [flat[f"{name}.{leaf}"][layer] if f"{name}.{leaf}" in flat else None for name in dense.ours]
    there = [n for n, x in enumerate(own) if x is not None]
    if not there:
        return {}, 0
    if leaf == "ia3":
        if dense.at_input:
            return {"ia3_l": own[0].reshape(1, -1)}, 1
        ones = [np.ones(shape, np.float32) if x is None else x for x, shape in zip(own, dense.shapes, strict=True)]
        return {"ia3_l": dense.whole_of([x[None] for x in ones], 1)}, 1
    total = rank * len(there)
    a = [dense.a_of(flat[f"{dense.ours[n]}.lora_a"][layer], rank, back=True) for n in there]
    b = [np.zeros((total, *shape), np.float32) for shape in dense.shapes]
    for block, n in enumerate(there):
        b[n][block * rank : (block + 1) * rank] = own[n]
    return {"lora_A.weight": np.concatenate(a), "lora_B.weight": dense.whole_of(b, total)}, total


def _of_dense(adapter, config, kind, flat):
    """-> tensors, and what adapter_config.json says of them"""
    tensors, ranks, at_input, conv1d = {}, {}, set(), False
    for dense in _dense_layers(config, kind):
        parts, rank = _written(adapter, dense, flat)
        tensors |= {f"{PREFIX}{dense.name}.{part}": x for part, x in parts.items()}
        if parts:
            ranks[dense.pattern] = rank
            at_input |= {dense.pattern} if dense.at_input else set()
            conv1d |= dense.conv1d
    raw = {"target_modules": "|".join(ranks), "fan_in_fan_out": conv1d}
    if adapter.kind == "ia3":
        return tensors, raw | {"feedforward_modules": "|".join(sorted(at_input))}
    ranks = {pattern: rank for pattern, rank in ranks.items() if rank != adapter.rank}
    alphas = {pattern: _alpha(adapter.scale, rank, adapter.rank_stabilised) for pattern, rank in ranks.items()}
    raw |= {"r": adapter.rank, "lora_alpha": adapter.alpha, "use_rslora": adapter.rank_stabilised, "bias": "none"}
    return tensors, raw | {"rank_pattern": ranks, "alpha_pattern": alphas}


def _alpha(scale: float, rank: int, stabilised: bool) -> float:
    """The alpha by which this rank has this scale."""
    return scale * (rank**0.5 if stabilised else rank)


def _read_dense(config, kind, raw, tensors, folder):
    """-> Adapter, {path: leaf}"""
    where, lora, prefix = folder / WEIGHTS, raw["peft_type"] == "LORA", family_for(kind, config).prefix
    wanted, tensors, found = ("lora_A.weight", "lora_B.weight") if lora else ("ia3_l",), dict(tensors), []
    for dense in _dense_layers(config, kind):
        names = (dense.name, dense.name.removeprefix(prefix))  # a file of the bare backbone has the shorter one
        parts = [next((tensors.pop(x) for x in (f"{PREFIX}{n}.{p}" for n in names) if x in tensors), None) for p in wanted]
        if any(part is not None for part in parts):
            width, out = dense.in_out
            rank = parts[0].shape[0] if lora and parts[0] is not None and parts[0].shape else 1
            shapes = [(rank, width), (out, rank)] if lora else [(1, width) if dense.at_input else (out, 1)]
            if (have := [None if part is None else part.shape for part in parts]) != shapes:
                raise ValueError(f"{where}: the tensors of {dense.name} have shapes {have} where the model asks for {shapes}")
            found.append((dense, parts, rank))
    if tensors or not found:
        name = brief(min(tensors)) if tensors else "none"
        raise ValueError(f"{where}: tensor {name}, and {max(0, len(tensors) - 1)} more, have no place in this model's dense layers")
    scales = _scales(raw, found, folder) if lora else None
    targets = "^(" + "|".join(sorted({re.escape(name) for dense, _, _ in found for name in dense.ours})) + ")$"
    adapter = Adapter("ia3", targets)
    if lora:
        rank, stabilised = max(rank for _, _, rank in found), raw.get("use_rslora") is True
        scale = max(of for of, (_, _, own) in zip(scales, found, strict=True) if own == rank)
        adapter = Adapter("lora", targets, rank, _alpha(scale, rank, stabilised), stabilised)
    flat = {}
    for path, shape in layout.leaves_of(replace(config, adapter=adapter)).items():
        if path.endswith((".lora_a", ".lora_b", ".ia3")):
            flat[path] = (np.ones if path.endswith(".ia3") else np.zeros)(shape, np.float32)
    for n, (dense, parts, rank) in enumerate(found):
        x = [part.read() for part in parts]
        if not lora:
            for name, part in zip(dense.ours, [x[0]] if dense.at_input else dense.parts_of(x[0], 1), strict=True):
                flat[f"{name}.ia3"][dense.layer] = part[0]
            continue
        for name, b in zip(dense.ours, dense.parts_of(x[1], rank), strict=True):
            flat[f"{name}.lora_a"][dense.layer][..., :rank] = dense.a_of(x[0], rank)
            flat[f"{name}.lora_b"][dense.layer][:rank] = b * np.float32(scales[n] / adapter.scale)
    return adapter, flat


def _scales(raw, found, folder) -> list[float]:
    """What PEFT multiplies B A of each dense layer by."""
    where, told = folder / CONFIG, []
    patterns = {key: raw.get(key) or {} for key in ("rank_pattern", "alpha_pattern")}
    used = set()

    def of(key, default, name):
        for pattern, value in patterns[key].items():
            plain = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")  # a stranger's expression is not run as one
            if re.fullmatch(r"(.*\.)?" + r"\d+".join(map(re.escape, plain.split(r"\d+"))), name):
                used.add((key, pattern))
                return value
        return raw.get(default)

    for dense, _, rank in found:
        alpha, own = of("alpha_pattern", "lora_alpha", dense.name), of("rank_pattern", "r", dense.name)
        if type(alpha) not in (int, float) or not 0 < alpha < 1e9 or type(own) is not int or own != rank:
            raise ValueError(f"{where}: {dense.name} has alpha {brief(alpha)} and rank {brief(own)}; its tensors have rank {rank}")
        told.append(alpha / (rank**0.5 if raw.get("use_rslora") is True else rank))
    if lost := [pattern for key, of in patterns.items() for pattern in of if (key, pattern) not in used]:
        raise ValueError(f"{where}: {brief(lost[0])} of rank_pattern or alpha_pattern is the name of no tensor that is there")
    return told


# ---------------------------------------------------------------- files


def _digest_below(flat: dict) -> str:
    return files.digest({name: x for name, x in flat.items() if not re.search(rf"{ADDED}|^scalar\.", name)})


def _write(folder: Path, raw: dict, tensors: dict, below: str):
    """To a folder beside, which then takes the name."""
    ours = {CONFIG, WEIGHTS, files.SEAL}
    if folder.exists() and (strange := sorted({path.name for path in folder.iterdir()} - ours - {"README.md"})):
        raise FileExistsError(f"{folder} holds '{strange[0]}', which is no part of an adapter: export to another folder")
    new, old = (folder.parent / f".{folder.name}.{what}" for what in ("new", "old"))
    for left in (new, old):  # of an export that was killed
        shutil.rmtree(left, ignore_errors=True)
    new.mkdir(parents=True)
    save_file({name: np.ascontiguousarray(x, np.float32) for name, x in tensors.items()}, new / WEIGHTS, metadata={"format": "pt"})
    (new / CONFIG).write_text(json.dumps(raw, indent=2))
    files.seal(new, below=below)
    if folder.exists():
        folder.replace(old)
    new.replace(folder)
    shutil.rmtree(old, ignore_errors=True)


def _check_seal(folder: Path, params):
    """ValueError where the files are not those that were exported, or the model is another. A folder without a seal passes."""
    if not (folder / files.SEAL).exists():
        return
    told = files.read_json(files.member(folder, files.SEAL))
    digests = told.get("sha256")
    for name in (CONFIG, WEIGHTS):
        if not isinstance(digests, dict) or digests.get(name) != files.sha256(files.member(folder, name)):
            raise ValueError(f"{folder / name} is not as it was exported: its sha256 is not the one in {files.SEAL}")
    if "below" in told and told["below"] != _digest_below(layout.flatten(params)):
        raise ValueError(f"{folder}: this is not the model that the adapter was trained on; if it is meant, delete {files.SEAL}")
