"""How checkpoints spell the decoder: one table a family for its tensors and one for its config, each read in both directions.

A row of a tensor table: name ({} is the layer), layout, leaves of the decoder's tree. A layout gives the tensor's axes, then the
leaf's; axes in brackets are one flattened axis. Letters: V vocabulary, C context, D width, H heads, G key/value heads, K head size,
M width of the MLP, N leaves that share one tensor, P = 2 and J = K/2 the members and the number of rotary pairs.
"""

import re
from typing import NamedTuple

REQUIRED = object()
ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_new"}  # ours: the spelling we write
ACTIVATION_SPELLINGS = {"swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh"}
ACTIVATION_SPELLINGS |= {theirs: ours for ours, theirs in ACTIVATIONS.items()}
BUFFERS = re.compile(r"\.((attn|attention)\.(bias|masked_bias)|rotary_emb\.inv_freq)$")  # no parameters
SCALAR = (("score.weight", "1 D -> D", "scalar.kernel"), ("score.bias", "1 -> ", "scalar.bias"))  # the bias is ours


class Family(NamedTuple):
    rows: tuple
    prefix: str  # of the names, which a file of the bare backbone leaves out
    architectures: tuple  # the classes of transformers: language model, classifier
    fields: dict  # field of DecoderConfig: (key of config.json, value where the key is absent); key None: always that value
    rope: dict  # rotary key: its old spelling
    aliases: dict  # other spelling of a tensor: ours


def _norm(name, leaf, biased):
    weight = (f"{name}.weight", "D -> D", f"{leaf}.scale")
    return (weight, (f"{name}.bias", "D -> D", f"{leaf}.bias")) if biased else (weight,)


def _linear(name, leaf, layout):
    """weight and bias; the bias has the weight's output axes, which torch puts first."""
    out, into = layout.split(",")
    ours = f"{into.strip('()')} {out.strip('()')}"
    bias = (f"{name}.bias", f"{out} -> {out.strip('()')}", f"{leaf}.bias")
    return (f"{name}.weight", f"{out} {into} -> {ours}", f"{leaf}.kernel"), bias


_LLAMA = (
    ("model.embed_tokens.weight", "V D -> V D", "embed.tokens"),
    *_norm("model.layers.{}.input_layernorm", "layers.attention_norm", False),
    *_linear("model.layers.{}.self_attn.q_proj", "layers.attention.q", "(H K),D"),
    *_linear("model.layers.{}.self_attn.k_proj", "layers.attention.k", "(G K),D"),
    *_linear("model.layers.{}.self_attn.v_proj", "layers.attention.v", "(G K),D"),
    *_linear("model.layers.{}.self_attn.o_proj", "layers.attention.o", "D,(H K)"),
    *_norm("model.layers.{}.post_attention_layernorm", "layers.mlp_norm", False),
    *_linear("model.layers.{}.mlp.gate_proj", "layers.mlp.gate", "M,D"),
    *_linear("model.layers.{}.mlp.up_proj", "layers.mlp.up", "M,D"),
    *_linear("model.layers.{}.mlp.down_proj", "layers.mlp.down", "D,M"),
    *_norm("model.norm", "norm", False),
    ("lm_head.weight", "V D -> V D", "head.kernel"),
    *SCALAR,
)
_QKV = ("layers.attention.q", "layers.attention.k", "layers.attention.v")
_GPT2 = (  # Conv1D: kernels are [in, out]
    ("transformer.wte.weight", "V D -> V D", "embed.tokens"),
    ("transformer.wpe.weight", "C D -> C D", "embed.positions"),
    *_norm("transformer.h.{}.ln_1", "layers.attention_norm", True),
    ("transformer.h.{}.attn.c_attn.weight", "D (N H K) -> N D H K", *(f"{leaf}.kernel" for leaf in _QKV)),
    ("transformer.h.{}.attn.c_attn.bias", "(N H K) -> N H K", *(f"{leaf}.bias" for leaf in _QKV)),
    ("transformer.h.{}.attn.c_proj.weight", "(H K) D -> H K D", "layers.attention.o.kernel"),
    ("transformer.h.{}.attn.c_proj.bias", "D -> D", "layers.attention.o.bias"),
    *_norm("transformer.h.{}.ln_2", "layers.mlp_norm", True),
    ("transformer.h.{}.mlp.c_fc.weight", "D M -> D M", "layers.mlp.up.kernel"),
    ("transformer.h.{}.mlp.c_fc.bias", "M -> M", "layers.mlp.up.bias"),
    ("transformer.h.{}.mlp.c_proj.weight", "M D -> M D", "layers.mlp.down.kernel"),
    ("transformer.h.{}.mlp.c_proj.bias", "D -> D", "layers.mlp.down.bias"),
    *_norm("transformer.ln_f", "norm", True),
    ("lm_head.weight", "V D -> V D", "head.kernel"),
    *SCALAR,
)
_NEOX = (
    ("gpt_neox.embed_in.weight", "V D -> V D", "embed.tokens"),
    *_norm("gpt_neox.layers.{}.input_layernorm", "layers.attention_norm", True),
    ("gpt_neox.layers.{}.attention.query_key_value.weight", "(H N K) D -> N D H K", *(f"{leaf}.kernel" for leaf in _QKV)),
    ("gpt_neox.layers.{}.attention.query_key_value.bias", "(H N K) -> N H K", *(f"{leaf}.bias" for leaf in _QKV)),
    *_linear("gpt_neox.layers.{}.attention.dense", "layers.attention.o", "D,(H K)"),
    *_norm("gpt_neox.layers.{}.post_attention_layernorm", "layers.mlp_norm", True),
    *_linear("gpt_neox.layers.{}.mlp.dense_h_to_4h", "layers.mlp.up", "M,D"),
    *_linear("gpt_neox.layers.{}.mlp.dense_4h_to_h", "layers.mlp.down", "D,M"),
    *_norm("gpt_neox.final_layer_norm", "norm", True),
    ("lm_head.weight", "V D -> V D", "head.kernel"),
    *SCALAR,
)

_SIZES = {
    "vocab": ("vocab_size", REQUIRED),
    "width": ("hidden_size", REQUIRED),
    "layers": ("num_hidden_layers", REQUIRED),
    "heads": ("num_attention_heads", REQUIRED),
    "mlp": ("intermediate_size", REQUIRED),
    "context": ("max_position_embeddings", REQUIRED),
    "activation": ("hidden_act", REQUIRED),
}
_SAME_HEADS = {"kv_heads": (None, lambda f: f["heads"]), "head_dim": (None, lambda f: f["width"] // f["heads"])}
_LAYER_NORM = {"norm": (None, "layer"), "gated": (None, False), "mlp_bias": (None, True)}
_LLAMA_FIELDS = {
    **_SIZES,
    "kv_heads": ("num_key_value_heads", lambda f: f["heads"]),
    "head_dim": ("head_dim", lambda f: f["width"] // f["heads"]),
    "norm": (None, "rms"),
    "norm_eps": ("rms_norm_eps", 1e-6),
    "gated": (None, True),
    "positions": (None, "rope"),
    "rope_theta": ("rope_theta", 10000.0),
    "rope_fraction": (None, 1.0),
    "parallel": (None, False),
    "qkv_bias": ("attention_bias", False),
    "out_bias": ("attention_bias", False),
    "mlp_bias": ("mlp_bias", False),
    "tied": ("tie_word_embeddings", False),
}
_QWEN2_FIELDS = _LLAMA_FIELDS | {"qkv_bias": (None, True), "out_bias": (None, False), "mlp_bias": (None, False)}
_GPT2_FIELDS = {
    "vocab": ("vocab_size", REQUIRED),
    "width": ("n_embd", REQUIRED),
    "layers": ("n_layer", REQUIRED),
    "heads": ("n_head", REQUIRED),
    "mlp": ("n_inner", lambda f: 4 * f["width"]),
    "context": ("n_positions", REQUIRED),
    "activation": ("activation_function", "gelu_new"),
    **_SAME_HEADS,
    **_LAYER_NORM,
    "norm_eps": ("layer_norm_epsilon", 1e-5),
    "positions": (None, "learned"),
    "parallel": (None, False),
    "qkv_bias": (None, True),
    "out_bias": (None, True),
    "tied": ("tie_word_embeddings", True),
}
_NEOX_FIELDS = {
    **_SIZES,
    **_SAME_HEADS,
    **_LAYER_NORM,
    "norm_eps": ("layer_norm_eps", 1e-5),
    "positions": (None, "rope"),
    "rope_theta": ("rope_theta", 10000.0),
    "rope_fraction": ("partial_rotary_factor", 0.25),
    "parallel": ("use_parallel_residual", True),
    "qkv_bias": ("attention_bias", True),
    "out_bias": ("attention_bias", True),
    "tied": ("tie_word_embeddings", False),
}
_ROPE, _NEOX_ROPE = {"rope_theta": "rope_theta"}, {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
FAMILIES = {
    "llama": Family(_LLAMA, "model.", ("LlamaForCausalLM", "LlamaForSequenceClassification"), _LLAMA_FIELDS, _ROPE, {}),
    "qwen2": Family(_LLAMA, "model.", ("Qwen2ForCausalLM", "Qwen2ForSequenceClassification"), _QWEN2_FIELDS, _ROPE, {}),
    "gpt2": Family(_GPT2, "transformer.", ("GPT2LMHeadModel", "GPT2ForSequenceClassification"), _GPT2_FIELDS, {}, {}),
    "gpt_neox": Family(
        _NEOX,
        "gpt_neox.",
        ("GPTNeoXForCausalLM", "GPTNeoXForSequenceClassification"),
        _NEOX_FIELDS,
        _NEOX_ROPE,
        {"embed_out.weight": "lm_head.weight"},
    ),
}
LACKING = {  # keys that change what a model computes: the one value (beside null) that means what the decoder does
    "quantization_config": None,
    "num_experts": 0,
    "num_local_experts": 0,
    "n_routed_experts": 0,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "alibi": False,
    "clip_qkv": None,
    "qk_layernorm": False,
    "use_qk_norm": False,
    "use_mrope": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}


def _gguf(turned):
    """The names of llama.cpp. Where `turned`, rows of q and k stand pair by pair; ours are in two halves."""
    q, k = ("(H J P)", "(G J P)") if turned else ("(H K)", "(G K)")
    q_out, k_out = ("H (P J)", "G (P J)") if turned else ("H K", "G K")
    return (
        ("token_embd.weight", "V D -> V D", "embed.tokens"),
        *_norm("blk.{}.attn_norm", "layers.attention_norm", False),
        ("blk.{}.attn_q.weight", f"{q} D -> D {q_out}", "layers.attention.q.kernel"),
        ("blk.{}.attn_q.bias", f"{q} -> {q_out}", "layers.attention.q.bias"),
        ("blk.{}.attn_k.weight", f"{k} D -> D {k_out}", "layers.attention.k.kernel"),
        ("blk.{}.attn_k.bias", f"{k} -> {k_out}", "layers.attention.k.bias"),
        *_linear("blk.{}.attn_v", "layers.attention.v", "(G K),D"),
        *_linear("blk.{}.attn_output", "layers.attention.o", "D,(H K)"),
        *_norm("blk.{}.ffn_norm", "layers.mlp_norm", False),
        *_linear("blk.{}.ffn_gate", "layers.mlp.gate", "M,D"),
        *_linear("blk.{}.ffn_up", "layers.mlp.up", "M,D"),
        *_linear("blk.{}.ffn_down", "layers.mlp.down", "D,M"),
        *_norm("output_norm", "norm", False),
        ("output.weight", "V D -> V D", "head.kernel"),
    )


GGUF = {"llama": _gguf(True), "qwen2": _gguf(False)}
