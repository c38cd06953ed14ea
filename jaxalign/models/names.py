"""How checkpoints spell our models: one table a family for its tensors and one for its config, each read in both directions.

A row of a tensor table: name ({} is the layer), layout, leaves of the model's tree. A layout gives the tensor's axes, then the
leaf's; axes in brackets are one flattened axis; layouts joined by + are parts of one tensor along its first axis, a leaf each.
Letters: V vocabulary, C context, D width, H heads, G key/value heads, K head size, M width of the MLP, R buckets of distances, N
leaves that share one tensor, P = 2 and J = K/2 the members and the number of rotary pairs.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from jaxalign.models.decoder import DecoderConfig
from jaxalign.models.encdec import EncDecConfig
from jaxalign.models.spellings import all_but_each_nth, every_other, everywhere, from_a_layer_on

REQUIRED = object()
ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu"}  # ours: the spelling we write
ACTIVATION_SPELLINGS = {"swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh"}
ACTIVATION_SPELLINGS |= {theirs: ours for ours, theirs in ACTIVATIONS.items()}
BUFFERS = re.compile(  # no parameters, or none that is used
    r"\.((attn|attention)\.(bias|masked_bias)|rotary_emb\.inv_freq|EncDecAttention\.relative_attention_bias\.weight)$"
)
SCALAR = (("score.weight", "1 D -> D", "scalar.kernel"), ("score.bias", "1 -> ", "scalar.bias"))  # the bias is ours


class Family(NamedTuple):
    rows: tuple  # or (config) -> tuple
    prefix: str  # of the names, which a file of the bare backbone leaves out
    architectures: tuple  # the classes of transformers: language model, classifier
    fields: dict  # field of the config: (key of config.json, value where the key is absent); key None: always that value
    rope: dict  # rotary key: its old spelling
    aliases: dict  # other spelling of a tensor: ours
    slides: Callable = everywhere  # (config.json, layer) -> does it have the window, where layer_types does not say
    config: type = DecoderConfig
    copies: tuple = ()  # other tensors that hold the embedding


def _norm(name, leaf, biased, axis="D"):
    weight = (f"{name}.weight", f"{axis} -> {axis}", f"{leaf}.scale")
    return (weight, (f"{name}.bias", f"{axis} -> {axis}", f"{leaf}.bias")) if biased else (weight,)


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
_HEAD_NORMS = (
    *_norm("model.layers.{}.self_attn.q_norm", "layers.attention.q_norm", False, "K"),
    *_norm("model.layers.{}.self_attn.k_norm", "layers.attention.k_norm", False, "K"),
)
_QWEN3 = (*_LLAMA, *_HEAD_NORMS)
_NO_NORMS = tuple(row for row in _LLAMA if "layernorm" not in row[0])
_POST_NORMS = (
    *_norm("model.layers.{}.post_attention_layernorm", "layers.attention_post_norm", False),
    *_norm("model.layers.{}.post_feedforward_layernorm", "layers.mlp_post_norm", False),
)
_OLMO2 = (
    *_NO_NORMS,
    *_POST_NORMS,
    ("model.layers.{}.self_attn.q_norm.weight", "(H K) -> H K", "layers.attention.q_norm.scale"),
    ("model.layers.{}.self_attn.k_norm.weight", "(G K) -> G K", "layers.attention.k_norm.scale"),
)
_GEMMA2 = (
    *_NO_NORMS,
    *_norm("model.layers.{}.input_layernorm", "layers.attention_norm", False),
    *_norm("model.layers.{}.pre_feedforward_layernorm", "layers.mlp_norm", False),
    *_POST_NORMS,
)
_GEMMA3 = (*_GEMMA2, *_HEAD_NORMS)
_FUSED = tuple(f"{name}_proj" for name in ("q", "k", "v", "gate", "up"))
_PHI3 = (
    *(row for row in _LLAMA if not row[0].removesuffix(".weight").removesuffix(".bias").endswith(_FUSED)),
    (
        "model.layers.{}.self_attn.qkv_proj.weight",
        "(H K) D -> D H K + (G K) D -> D G K + (G K) D -> D G K",
        *(f"{leaf}.kernel" for leaf in _QKV),
    ),
    ("model.layers.{}.mlp.gate_up_proj.weight", "(N M) D -> N D M", "layers.mlp.gate.kernel", "layers.mlp.up.kernel"),
)
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


def _t5(config) -> tuple:
    gated = config.gated

    def side(name, crosses):
        block, layers = f"{name}.block.{{}}.layer", f"{name}.layers"
        attentions = [("0.SelfAttention", "attention"), *([("1.EncDecAttention", "cross")] if crosses else [])]
        mlp = len(attentions)
        wide = [("wi_0", "gate"), ("wi_1", "up")] if gated else [("wi", "up")]
        for number, (theirs, ours) in enumerate(attentions):
            yield from _norm(f"{block}.{number}.layer_norm", f"{layers}.{ours}_norm", False)
            for x in "qkv":
                yield from _linear(f"{block}.{theirs}.{x}", f"{layers}.{ours}.{x}", "(H K),D")
            yield from _linear(f"{block}.{theirs}.o", f"{layers}.{ours}.o", "D,(H K)")
        yield from _norm(f"{block}.{mlp}.layer_norm", f"{layers}.mlp_norm", False)
        for theirs, ours in wide:
            yield from _linear(f"{block}.{mlp}.DenseReluDense.{theirs}", f"{layers}.mlp.{ours}", "M,D")
        yield from _linear(f"{block}.{mlp}.DenseReluDense.wo", f"{layers}.mlp.down", "D,M")
        yield f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "R H -> R H", f"{name}.distances"
        yield from _norm(f"{name}.final_layer_norm", f"{name}.norm", False)

    embed, head = ("shared.weight", "V D -> V D", "embed.tokens"), ("lm_head.weight", "V D -> V D", "head.kernel")
    return embed, *side("encoder", False), *side("decoder", True), head, *SCALAR


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
_WINDOWS = {"windows": ("sliding_window", 4096)}
_NO_BIAS = {"qkv_bias": (None, False), "out_bias": (None, False), "mlp_bias": (None, False)}
_QWEN2_FIELDS = _LLAMA_FIELDS | _WINDOWS | _NO_BIAS | {"qkv_bias": (None, True)}
_QWEN3_FIELDS = _LLAMA_FIELDS | _WINDOWS | {"head_dim": ("head_dim", 128), "qk_norm": (None, "head"), "mlp_bias": (None, False)}
_MISTRAL_FIELDS = _LLAMA_FIELDS | _WINDOWS | _NO_BIAS
_PHI3_FIELDS = {
    **_LLAMA_FIELDS,
    **_NO_BIAS,
    "norm_eps": ("rms_norm_eps", 1e-5),
    "rope_fraction": ("partial_rotary_factor", 1.0),
    "windows": ("sliding_window", None),
}
_OLMO2_FIELDS = {
    **_LLAMA_FIELDS,
    "norm_eps": ("rms_norm_eps", 1e-5),
    "norm_place": (None, "post"),
    "qk_norm": (None, "width"),
    "mlp_bias": (None, False),
}
_GEMMA2_FIELDS = {
    **_LLAMA_FIELDS,
    **_WINDOWS,
    "activation": ("hidden_activation", "gelu_pytorch_tanh"),
    "head_dim": ("head_dim", 256),
    "norm": (None, "rms_plus_one"),
    "norm_place": (None, "both"),
    "mlp_bias": (None, False),
    "tied": ("tie_word_embeddings", True),
    "query_size": ("query_pre_attn_scalar", 256),
    "score_cap": ("attn_logit_softcapping", 50.0),
    "logit_cap": ("final_logit_softcapping", 30.0),
    "embed_scaled": (None, True),
}
_GEMMA3_FIELDS = {
    **_GEMMA2_FIELDS,
    "qk_norm": (None, "head"),
    "rope_theta": ("rope_theta", 1e6),
    "local_theta": ("rope_local_base_freq", 1e4),
    "score_cap": (None, None),
    "logit_cap": ("final_logit_softcapping", None),
}
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
_T5_FIELDS = {
    "vocab": ("vocab_size", REQUIRED),
    "width": ("d_model", REQUIRED),
    "encoder_layers": ("num_layers", REQUIRED),
    "layers": ("num_decoder_layers", lambda f: f["encoder_layers"]),
    "heads": ("num_heads", REQUIRED),
    "head_dim": ("d_kv", REQUIRED),
    "mlp": ("d_ff", REQUIRED),
    "buckets": ("relative_attention_num_buckets", 32),
    "furthest": ("relative_attention_max_distance", 128),
    "norm_eps": ("layer_norm_epsilon", 1e-6),
    "activation": ("dense_act_fn", REQUIRED),  # this and the next as feed_forward_proj says
    "gated": ("is_gated_act", REQUIRED),
    "tied": ("tie_word_embeddings", True),
    "head_scaled": ("scale_decoder_outputs", lambda f: f["tied"]),
    "start": ("decoder_start_token_id", 0),
}
_ROPE, _NEOX_ROPE = {"rope_theta": "rope_theta"}, {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
_PHI3_ROPE = {"rope_theta": "rope_theta", "partial_rotary_factor": "partial_rotary_factor"}


def _classes(name, classifier=None):
    return f"{name}ForCausalLM", f"{classifier or name}ForSequenceClassification"


FAMILIES = {
    "llama": Family(_LLAMA, "model.", _classes("Llama"), _LLAMA_FIELDS, _ROPE, {}),
    "qwen2": Family(_LLAMA, "model.", _classes("Qwen2"), _QWEN2_FIELDS, _ROPE, {}, from_a_layer_on),
    "gpt2": Family(_GPT2, "transformer.", ("GPT2LMHeadModel", "GPT2ForSequenceClassification"), _GPT2_FIELDS, {}, {}),
    "gpt_neox": Family(_NEOX, "gpt_neox.", _classes("GPTNeoX"), _NEOX_FIELDS, _NEOX_ROPE, {"embed_out.weight": "lm_head.weight"}),
    "mistral": Family(_LLAMA, "model.", _classes("Mistral"), _MISTRAL_FIELDS, _ROPE, {}),
    "phi3": Family(_PHI3, "model.", _classes("Phi3"), _PHI3_FIELDS, _PHI3_ROPE, {}),
    "qwen3": Family(_QWEN3, "model.", _classes("Qwen3"), _QWEN3_FIELDS, _ROPE, {}, from_a_layer_on),
    "olmo2": Family(_OLMO2, "model.", _classes("Olmo2"), _OLMO2_FIELDS, _ROPE, {}),
    "gemma2": Family(_GEMMA2, "model.", _classes("Gemma2"), _GEMMA2_FIELDS, _ROPE, {}, every_other),
    "gemma3_text": Family(_GEMMA3, "model.", _classes("Gemma3", "Gemma3Text"), _GEMMA3_FIELDS, _ROPE, {}, all_but_each_nth),
    **{
        name: Family(
            *(_t5, "", (f"{name.upper()}ForConditionalGeneration",) * 2, fields, {}, {}),  # no class there has a scalar head
            config=EncDecConfig,
            copies=("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
        )
        for name, fields in (("t5", _T5_FIELDS), ("mt5", _T5_FIELDS | {"head_scaled": (None, False)}))
    },
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
    "use_bidirectional_attention": False,
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
