"""Makes families/*.json: what transformers computes with a tiny model of every family whose configs go beyond Llama's.

    python tests/golden/make_families.py

wants torch and transformers, which nothing else here does. The files are laid out as tiny_*_parity.json, which see: `inputs` holds
config.json as hubs have it, tensors by their names (drawn, then rounded to 4 decimals), and two documents, padded and packed;
`outputs` the logits of each document alone, the mean negative log-likelihood of both, and the norms of its gradient. Numbers are
float64, but where transformers itself goes through float32 (softmax, norms). Windows are shorter than the documents.
"""

import json
from pathlib import Path

import torch
import transformers

HERE = Path(__file__).parent / "families"
SIZES = {"vocab_size": 14, "hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "num_key_value_heads": 1}
SIZES |= {"num_hidden_layers": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
SIZES |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "head_dim": 4, "tie_word_embeddings": True, "query_pre_attn_scalar": 6}
CONFIGS = {
    "llama3": {
        "model_type": "llama",
        "head_dim": 8,  # 4 frequencies: one left, one between, two divided
        "hidden_act": "silu",
        "rope_theta": 100.0,
        "rope_scaling": {"rope_type": "llama3", **LLAMA3},
    },
    "mistral": {"model_type": "mistral", "hidden_act": "silu", "rope_theta": 1000.0, "sliding_window": 4},
    "phi3": {  # unequal parts of qkv_proj
        "model_type": "phi3",
        "head_dim": 8,
        "hidden_act": "silu",
        "rope_theta": 500.0,
        "partial_rotary_factor": 0.5,
        "sliding_window": 4,
    },
    "qwen3": {
        "model_type": "qwen3",
        "head_dim": 6,
        "hidden_act": "silu",
        "rope_theta": 1000.0,
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 1,
    },
    "olmo2": {
        "model_type": "olmo2",
        "head_dim": 4,
        "hidden_act": "silu",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_theta": 500.0,
    },
    "gemma2": GEMMA
    | {
        "model_type": "gemma2",
        "hidden_act": "gelu_pytorch_tanh",
        "rope_theta": 1000.0,
        "sliding_window": 4,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3": GEMMA
    | {
        "model_type": "gemma3_text",
        "num_hidden_layers": 4,
        "rope_theta": 1000.0,
        "rope_local_base_freq": 50.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window": 4,
        "sliding_window_pattern": 3,
    },
}
TEXTS = [[3, 10, 9, 2, 2, 12, 7, 1, 4, 11], [8, 6, 8, 5, 1, 3, 10]]


def rounded(x):
    return [rounded(y) for y in x] if isinstance(x, list) else round(x, 8)


def padded(side):
    spare = [[0] * (len(TEXTS[0]) - len(text)) for text in TEXTS]
    rows = [(pad + text, [0] * len(pad) + [1] * len(text)) for pad, text in zip(spare, TEXTS, strict=True)]
    if side == "right":
        rows = [(text + pad, [1] * len(text) + [0] * len(pad)) for pad, text in zip(spare, TEXTS, strict=True)]
    return {"input_ids": [ids for ids, _ in rows], "attention_mask": [mask for _, mask in rows]}


def make(name, own):
    raw = SIZES | own
    keys = {k: v for k, v in raw.items() if k != "model_type"}
    config = transformers.AutoConfig.for_model(raw["model_type"], **json.loads(json.dumps(keys)), attn_implementation="eager")
    torch.manual_seed(len(name))
    model = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    for parameter, tensor in model.named_parameters():
        around = 0.0 if "norm" not in parameter or "gemma" in name else 1.0
        tensor.data = (around + (0.15 if "norm" in parameter else 0.45) * torch.randn(tensor.shape)).double().mul(1e4).round() / 1e4
    tensors = {parameter: tensor.tolist() for parameter, tensor in model.named_parameters()}
    logits = [model(input_ids=torch.tensor([text])).logits[0] for text in TEXTS]
    logp = [z.log_softmax(-1)[:-1].gather(1, torch.tensor(text[1:])[:, None]) for z, text in zip(logits, TEXTS, strict=True)]
    loss = -torch.cat(logp).mean()
    loss.backward()
    norms = {parameter: tensor.grad.norm().item() for parameter, tensor in model.named_parameters()}
    return {
        "name": f"family_{name}",
        "case": "shared",
        "tolerance": 1e-5,
        "objective": f"Forward parity of a tiny {raw['model_type']} checkpoint with the transformers (PyTorch) implementation",
        "inputs": {
            "config": raw,
            "params": tensors,
            "right_padded": padded("right"),
            "left_padded": padded("left"),
            "packed": {"input_ids": sum(TEXTS, []), "segment_ids": [i + 1 for i, text in enumerate(TEXTS) for _ in text]},
        },
        "outputs": {
            **{f"logits_sequence_{i}": rounded(z.tolist()) for i, z in enumerate(logits)},
            "nll_token_mean": round(loss.item(), 8),
            "grad_norms": {parameter: round(norm, 8) for parameter, norm in norms.items()},
            "global_grad_norm": round(sum(norm**2 for norm in norms.values()) ** 0.5, 8),
        },
        "source": f"transformers {transformers.__version__}, torch {torch.__version__}, eager attention, float64",
    }


if __name__ == "__main__":
    HERE.mkdir(exist_ok=True)
    for name, own in CONFIGS.items():
        (HERE / f"{name}.json").write_text(json.dumps(make(name, own)) + "\n")
