"""Makes t5/*.json: what transformers computes with tiny T5s: the first (ReLU, tied); 1.1, Flan and ByT5 (gated, untied); UL2 (the
same by SiLU); and mT5, which has the numbers of 1.1 under another model_type.

    python tests/golden/make_t5.py

wants torch and transformers. `inputs` holds config.json as hubs have it, tensors by their names (drawn, then rounded to 4
decimals), and two sources, one longer than the furthest distance, with what the decoder is given; `outputs` the logits of each
document alone. Numbers are float64, but where transformers goes through float32 (softmax, norms, the logarithm of buckets).
"""

import json
from pathlib import Path

import torch
import transformers

HERE = Path(__file__).parent / "t5"
SIZES = {"vocab_size": 12, "d_model": 8, "d_kv": 6, "d_ff": 10, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 2}
SIZES |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 12, "decoder_start_token_id": 0}
CONFIGS = {
    "first": {"feed_forward_proj": "relu", "tie_word_embeddings": True},
    "flan": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "ul2": {"feed_forward_proj": "gated-silu", "tie_word_embeddings": False},
    "mt5": {"model_type": "mt5", "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
}


def make(name, changes):
    told = {"model_type": "t5", **SIZES, **changes}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**told)
    model = transformers.AutoModelForSeq2SeqLM.from_config(config).double().eval()
    if not changes["tie_word_embeddings"]:  # transformers 5 ties the head of every T5 until a checkpoint has another
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    with torch.no_grad():
        for parameter in model.parameters():
            around = 1.0 if parameter.ndim == 1 else 0.0
            parameter.copy_((around + 0.4 * torch.randn(parameter.shape, dtype=torch.float64)).round(decimals=4))
        documents = [[torch.randint(1, 12, (1, n)) for n in lengths] for lengths in ((19, 15), (4, 3))]
        said = [(source, torch.cat([torch.zeros(1, 1, dtype=int), target], 1)) for source, target in documents]
        logits = [model(input_ids=source, decoder_input_ids=target).logits[0] for source, target in said]
    params = dict(model.named_parameters())  # each once: what is shared comes under its first name
    case = {
        "inputs": {
            "config": told,
            "params": {key: x.tolist() for key, x in params.items()},
            "sources": [source[0].tolist() for source, _ in said],
            "decoder_input_ids": [target[0].tolist() for _, target in said],
        },
        "outputs": {f"logits_{n}": [[round(x, 8) for x in row] for row in rows.tolist()] for n, rows in enumerate(logits)},
        "source": f"transformers {transformers.__version__}, torch {torch.__version__}, float64",
    }
    (HERE / f"{name}.json").write_text(json.dumps(case))


if __name__ == "__main__":
    HERE.mkdir(exist_ok=True)
    for name, changes in CONFIGS.items():
        make(name, changes)
