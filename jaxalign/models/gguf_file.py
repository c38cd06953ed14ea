"""GGUF files, llama.cpp's: config, tensors and tokenizer. Needs the package gguf: pip install gguf."""

import math
from functools import partial
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from jaxalign.models.layout import Tensor, brief
from jaxalign.models.names import GGUF

MAGIC, HEADER_BYTES = 0x46554747, 64 * 2**20  # "GGUF"; a vocabulary of 262 k tokens makes 16 MB
SCALARS = dict(enumerate(["u1", "i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?"])) | {10: "<u8", 11: "<i8", 12: "<f8"}
TEXT, ARRAY = 8, 9
CONTROL, USER = 3, 4  # token types: special, and added but not special
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(digits):
    split = pre_tokenizers.Split(Regex(_WORDS + digits + _REST), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
_DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _BYTES])
SPLITS = {  # tokenizer.ggml.pre: how text is cut before merges
    "default": _BYTES,
    "gpt-2": _BYTES,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "llama-bpe": _split(r"\p{N}{1,3}"),
    "qwen2": _split(r"\p{N}"),
}


def read(path: Path):
    """-> (metadata {key: value}, {name: (shape, kind, its bytes u8 [N])} of the tensors, mapped into memory)

    Raises ImportError where gguf is not installed; ValueError for another kind of file, or one whose header does not fit it.
    """
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    except ImportError as error:
        raise ImportError(f"reading {path.name} needs the package gguf: pip install gguf") from error
    data = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8)
    try:
        meta, infos, end = _header(data)
        align = meta.get("general.alignment", 32)
        if type(align) is not int or not 0 < align <= 2**16 or align & (align - 1):
            raise ValueError(f"general.alignment = {brief(align)}")
        base, tensors = -(-end // align) * align, {}
        for name, shape, number, start in sorted(infos, key=lambda info: info[3]):
            kind = GGMLQuantizationType(number)
            block, size = GGML_QUANT_SIZES[kind]
            count = math.prod(shape) // block * size
            if shape[-1] % block or start % align or base + start < end or base + start + count > len(data):
                raise ValueError(f"tensor {brief(name)} of {kind.name} {shape} at byte {start}, of {len(data) - base}")
            end = base + start + count
            tensors[name] = (shape, kind, data[base + start : end])
    except ValueError as error:
        raise ValueError(f"{path}: not a GGUF file, or cut short: {error}") from error
    return meta, tensors


def _header(data):
    """-> (metadata, [(tensor name, shape, number of its kind, first byte)], end of the header)"""
    at, view = 0, memoryview(data)

    def skip(size):
        """The next bytes; ValueError where the file ends before they do, or the header is too long."""
        nonlocal at
        start, at = at, at + size
        if at > min(len(data), HEADER_BYTES):
            raise ValueError(f"a header of {at} bytes or more in a file of {len(data)}; at most {HEADER_BYTES} are read")
        return view[start:at]

    def take(form, count=1):
        return np.frombuffer(skip(np.dtype(form).itemsize * count), form).tolist()

    def text():
        return str(skip(*take("<u8")), "utf-8")

    def value(kind, count=None):
        if kind == TEXT:
            return text() if count is None else [text() for _ in range(count)]
        if kind == ARRAY and count is None:
            return value(*take("<u4"), *take("<u8"))
        if kind not in SCALARS:
            raise ValueError(f"a value of kind {kind}")
        return take(SCALARS[kind])[0] if count is None else take(SCALARS[kind], count)

    def once(names, name):
        if name in names:
            raise ValueError(f"{brief(name)} is there twice")
        return name

    magic, version = take("<u4", 2)
    if magic != MAGIC or version not in (2, 3):
        raise ValueError(f"it starts with {magic:#x}, version {version}")
    tensors, keys = take("<u8", 2)
    meta, infos = {}, {}
    for _ in range(keys):
        name = once(meta, text())
        meta[name] = value(*take("<u4"))
    for _ in range(tensors):
        name, (axes,) = once(infos, text()), take("<u4")
        if not 0 < axes <= 4:
            raise ValueError(f"tensor {brief(name)} has {axes} axes")
        shape = tuple(reversed(take("<u8", axes)))
        infos[name] = (name, shape, *take("<u4"), *take("<u8"))
        if not all(0 < n < 2**48 for n in shape):
            raise ValueError(f"tensor {brief(name)} has shape {shape}")
    return meta, list(infos.values()), at


def _float(x):
    """The shortest decimal of a float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(x))) if type(x) is float else x


def load(path: Path):
    """(config in the keys of config.json, rows of names.GGUF, {name: Tensor}) of a file."""
    meta, found = read(path)
    from gguf.quants import dequantize

    arch = meta.get("general.architecture")
    if not isinstance(arch, str) or arch not in GGUF:
        raise ValueError(f"{path}: general.architecture {brief(arch)} is not among those read from GGUF: {', '.join(GGUF)}")

    def fetch(name, shape, kind, stored):
        try:
            return np.asarray(dequantize(stored.reshape(*shape[:-1], -1), kind), np.float32).reshape(shape)
        except NotImplementedError as error:
            raise ValueError(f"{path}: tensor {brief(name)} is stored as {kind.name}, which gguf cannot undo") from error

    tensors = {name: Tensor(entry[0], partial(fetch, name, *entry)) for name, entry in found.items()}

    def key(name, default=None):
        return meta.get(f"{arch}.{name}", default)

    heads, width, size = key("attention.head_count"), key("embedding_length"), key("attention.key_length")
    raw = {
        "model_type": arch,
        "vocab_size": tensors["token_embd.weight"].shape[0] if "token_embd.weight" in tensors else key("vocab_size"),
        "hidden_size": width,
        "num_hidden_layers": key("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": key("attention.head_count_kv"),
        "head_dim": size,
        "intermediate_size": key("feed_forward_length"),
        "max_position_embeddings": key("context_length"),
        "rms_norm_eps": _float(key("attention.layer_norm_rms_epsilon", 1e-6)),
        "rope_theta": _float(key("rope.freq_base", 10000.0)),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_output.bias" in tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in tensors,
        "num_experts": key("expert_count", 0),
        "sliding_window": key("attention.sliding_window"),
        "use_sliding_window": True,
    }
    if key("rope.scaling.type", "none") != "none" or key("rope.scaling.factor", key("rope.scale_linear", 1.0)) != 1.0:
        raw["rope_scaling"] = {"type": key("rope.scaling.type", "linear"), "factor": key("rope.scaling.factor")}
    turned = key("rope.dimension_count")
    if turned and all(type(x) is int and x > 0 for x in (turned, heads, width, size or 1)):
        raw["partial_rotary_factor"] = turned / (size or max(1, width // heads))
    return raw, GGUF[arch], tensors


def tokenizer(path: Path):
    """(tokenizers.Tokenizer, what transformers calls the rest) of a file's byte-level BPE. ValueError for other kinds."""
    meta = read(path)[0]

    def said(name, type_, default=None):
        value = meta.get(f"tokenizer.{name}", default)
        if value is not None and not isinstance(value, type_):
            raise ValueError(f"{path}: tokenizer.{name} = {brief(value)} should be of type {type_.__name__}")
        return value

    kind, cut = said("ggml.model", str), said("ggml.pre", str, "default")
    if kind != "gpt2":
        raise ValueError(
            f"{path}: tokenizer.ggml.model {brief(kind)} is not byte-level BPE ('gpt2'); give a tokenizer.json instead"
        )
    if cut not in SPLITS:
        raise ValueError(f"{path}: tokenizer.ggml.pre {brief(cut)} is not among {', '.join(SPLITS)}; give a tokenizer.json instead")
    tokens, types, merges = (said(f"ggml.{name}", list) for name in ("tokens", "token_type", "merges"))
    if None in (tokens, types, merges):
        raise ValueError(f"{path}: one of tokenizer.ggml.tokens, token_type, merges is missing")
    try:
        bpe = models.BPE(
            {token: i for i, token in enumerate(tokens)},
            [tuple(pair.split(" ")) for pair in merges],
            ignore_merges=cut == "llama-bpe",
        )
        out = Tokenizer(bpe)
        added = [(token, kind) for token, kind in zip(tokens, types, strict=True) if kind in (CONTROL, USER)]
        out.add_tokens([AddedToken(token, normalized=False, special=kind == CONTROL) for token, kind in added])
    except Exception as error:  # tokenizers raises nothing more special
        raise ValueError(f"{path}: its tokens, types and merges make no tokenizer: {brief(str(error))}") from error
    out.pre_tokenizer, out.decoder = SPLITS[cut], decoders.ByteLevel()
    if cut == "qwen2":
        out.normalizer = normalizers.NFC()
    roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {ours: said(f"ggml.{theirs}_token_id", int) for ours, theirs in roles.items()}
    if wrong := [role for role, i in ids.items() if i is not None and not 0 <= i < len(tokens)]:
        raise ValueError(f"{path}: the id of its {wrong[0]} token is {ids[wrong[0]]}, of {len(tokens)} tokens")
    rest = {f"{role}_token": tokens[i] for role, i in ids.items() if i is not None}
    if said("ggml.add_bos_token", bool, cut == "llama-bpe") and "bos_token" in rest:
        bos = rest["bos_token"]
        texts = {"single": f"{bos} $A", "pair": f"{bos} $A {bos} $B"}
        out.post_processor = processors.TemplateProcessing(**texts, special_tokens=[(bos, ids["bos"])])
    context = meta.get(f"{meta.get('general.architecture')}.context_length")
    limit = {"model_max_length": context} if type(context) is int else {}
    return out, rest | limit | {"chat_template": said("chat_template", str)}
