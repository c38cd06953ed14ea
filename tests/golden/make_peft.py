"""Makes peft/*.json: adapters as PEFT writes them, and what the models of tiny_*_parity.json compute with them.

    python tests/golden/make_peft.py

wants torch, transformers and peft, which nothing else here does. `adapter_config` is the file of that name, `tensors` are those of
adapter_model.safetensors (drawn, then rounded to 4 decimals), `logits` those of `tokens` (of `source` and them: t5), of a
classifier its score. Numbers are float64.
"""

import json
import tempfile
from pathlib import Path

import torch
import transformers
from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file

HERE = Path(__file__).parent
PATTERNS = {"rank_pattern": {"v_proj": 1, r"layers.\d+.mlp.down_proj": 3}, "alpha_pattern": {"^model.layers.1.self_attn.v_proj": 5}}
CASES = {  # name: (family, adapter)
    "llama_lora": ("llama", LoraConfig(r=2, lora_alpha=3, task_type="CAUSAL_LM", target_modules=["q_proj", "o_proj"])),
    "llama_rslora": ("llama", LoraConfig(r=2, use_rslora=True, target_modules="all-linear", **PATTERNS)),
    "llama_ia3": ("llama", IA3Config()),
    "llama_prefix": ("llama", PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")),
    "llama_score": ("llama", LoraConfig(r=1, task_type="SEQ_CLS")),
    "qwen2_lora": ("qwen2", LoraConfig(r=2, target_modules=["k_proj", "gate_proj"], layers_to_transform=[1])),
    "gpt2_lora": ("gpt2", LoraConfig(r=2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    "gpt2_ia3": ("gpt2", IA3Config(fan_in_fan_out=True)),
    "gpt2_prompt": ("gpt2", PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")),
    "gpt_neox_lora": ("gpt_neox", LoraConfig(r=2)),
    "t5_lora": ("t5", LoraConfig(r=2, target_modules=["q", "wo"], task_type="SEQ_2_SEQ_LM")),
}
TOKENS, SOURCE = [[3, 10, 9, 2, 2, 7, 1]], [[8, 6, 8, 5, 1]]
TASKS = {"t5": transformers.AutoModelForSeq2SeqLM, "score": transformers.AutoModelForSequenceClassification}


def plain(name, family):
    """The model of tiny_*_parity.json."""
    golden = json.loads((HERE / f"tiny_{family}_parity.json").read_text())["inputs"]
    raw = dict(golden["config"]) | {"pad_token_id": 0, "num_labels": 1}
    config = transformers.AutoConfig.for_model(raw.pop("model_type"), **raw)
    auto = TASKS.get(name.split("_")[-1], TASKS.get(family, transformers.AutoModelForCausalLM))
    model = auto.from_config(config, attn_implementation="eager").double()
    weights = {key: torch.tensor(x, dtype=torch.float64) for key, x in golden["params"].items()}
    missing, unknown = model.load_state_dict(weights, strict=False)
    tied = {"lm_head.weight", "score.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
    assert set(missing) <= tied and set(unknown) <= {"lm_head.weight"}, (missing, unknown)
    return model.eval()


def main():
    (HERE / "peft").mkdir(exist_ok=True)
    for name, (family, config) in CASES.items():
        torch.manual_seed(len(name))
        model = get_peft_model(plain(name, family), config).double().eval()
        with torch.no_grad():
            for x in model.parameters():
                if x.requires_grad:
                    x.copy_((x.float() + 0.3 * torch.randn_like(x.float())).mul(1e4).round().div(1e4))
            tokens = torch.tensor(TOKENS)
            if family == "t5":
                logits = model(input_ids=torch.tensor(SOURCE), decoder_input_ids=tokens).logits
            else:
                logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            raw = json.loads((Path(folder) / "adapter_config.json").read_text()) | {"base_model_name_or_path": None}
            tensors = load_file(Path(folder) / "adapter_model.safetensors")
        out = {
            "family": family,
            "adapter_config": raw,
            "tensors": {key: [[round(x, 4) for x in row] for row in tensor.tolist()] for key, tensor in tensors.items()},
            "tokens": TOKENS,
            "source": SOURCE,
            "logits": logits[:, -len(TOKENS[0]) :].tolist() if logits.ndim == 3 else logits.tolist(),
        }
        (HERE / "peft" / f"{name}.json").write_text(json.dumps(out) + "\n")


if __name__ == "__main__":
    main()
