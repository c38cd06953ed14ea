"""GGUF files, llama.cpp's: config, tensors and tokenizer. Needs the package gguf: pip install gguf."""

from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from jaxalign.models.layout import Tensor
from jaxalign.models.names import GGUF

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
    """The reader of a file and its metadata. ImportError where gguf is not installed; ValueError for another kind of file."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ImportError(f"reading {path.name} needs the package gguf: pip install gguf") from error
    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise ValueError(f"{path}: not a GGUF file, or cut short: {error}") from error
    return reader, {name: field.contents() for name, field in reader.fields.items()}


def _float(x):
    return float(str(np.float32(x)))  # the shortest decimal: 1e-05, not 9.999999747378752e-06


def load(path: Path):
    """(config in the keys of config.json, rows of names.GGUF, {name: Tensor}) of a file."""
    from gguf.quants import dequantize

    reader, meta = read(path)
    arch = meta.get("general.architecture")
    if arch not in GGUF:
        raise ValueError(f"{path}: general.architecture {arch!r} is not among those read from GGUF: {', '.join(GGUF)}")

    def fetch(t):
        try:
            return np.asarray(dequantize(t.data, t.tensor_type), np.float32)
        except NotImplementedError as error:
            raise ValueError(f"{path}: tensor '{t.name}' is stored as {t.tensor_type.name}, which gguf cannot undo") from error

    tensors = {t.name: Tensor(tuple(int(n) for n in reversed(t.shape)), lambda t=t: fetch(t)) for t in reader.tensors}

    def key(name, default=None):
        return meta.get(f"{arch}.{name}", default)

    heads, width = key("attention.head_count"), key("embedding_length")
    raw = {
        "model_type": arch,
        "vocab_size": tensors["token_embd.weight"].shape[0] if "token_embd.weight" in tensors else key("vocab_size"),
        "hidden_size": width,
        "num_hidden_layers": key("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": key("attention.head_count_kv"),
        "head_dim": key("attention.key_length"),
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
    if heads and width and (turned := key("rope.dimension_count")):
        raw["partial_rotary_factor"] = turned / (raw["head_dim"] or width // heads)
    return raw, GGUF[arch], tensors


def tokenizer(path: Path):
    """(tokenizers.Tokenizer, what transformers calls the rest) of a file's byte-level BPE. ValueError for other kinds."""
    meta = read(path)[1]
    kind, cut = meta.get("tokenizer.ggml.model"), meta.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2":
        raise ValueError(f"{path}: tokenizer.ggml.model {kind!r} is not byte-level BPE ('gpt2'); give a tokenizer.json instead")
    if cut not in SPLITS:
        raise ValueError(f"{path}: tokenizer.ggml.pre {cut!r} is not among {', '.join(SPLITS)}; give a tokenizer.json instead")
    lists = [meta.get(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type", "merges")]
    if None in lists:
        raise ValueError(f"{path}: one of tokenizer.ggml.tokens, token_type, merges is missing")
    tokens, types, merges = lists
    pairs = [tuple(pair.split(" ")) for pair in merges]
    bpe = models.BPE({token: i for i, token in enumerate(tokens)}, pairs, ignore_merges=cut == "llama-bpe")
    out = Tokenizer(bpe)
    out.pre_tokenizer, out.decoder = SPLITS[cut], decoders.ByteLevel()
    if cut == "qwen2":
        out.normalizer = normalizers.NFC()
    added = [(token, kind) for token, kind in zip(tokens, types, strict=True) if kind in (CONTROL, USER)]
    out.add_tokens([AddedToken(token, normalized=False, special=kind == CONTROL) for token, kind in added])
    roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {ours: meta.get(f"tokenizer.ggml.{theirs}_token_id") for ours, theirs in roles.items()}
    rest = {f"{role}_token": tokens[i] for role, i in ids.items() if i is not None}
    if meta.get("tokenizer.ggml.add_bos_token", cut == "llama-bpe") and "bos_token" in rest:
        bos = rest["bos_token"]
        texts = {"single": f"{bos} $A", "pair": f"{bos} $A {bos} $B"}
        out.post_processor = processors.TemplateProcessing(**texts, special_tokens=[(bos, ids["bos"])])
    context = meta.get(f"{meta.get('general.architecture')}.context_length")
    return out, rest | {"chat_template": meta.get("tokenizer.chat_template"), "model_max_length": context}
