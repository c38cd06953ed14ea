"""Variants for pods of TPUs, on any whose chips mesh.tensor divides.

`python -m experiments.plan` compiles their runs for such a pod on any machine; SCALING.md has what came out.
"""

LLAMA_3 = "meta-llama/Meta-Llama-3-{}-Instruct"
PREFERENCES = "../shared/data/preferences/hh_harmless_train.jsonl.gz"


def _wide(config, source: str, tensor: int, batch: int):
    """A published model, in bfloat16, on rows split by fsdp and heads split by tensor."""
    config.model.update(source=source, dtype="bfloat16", remat="full")
    config.mesh.update(data=1, fsdp=-1, tensor=tensor)
    config.run.batch = batch


def _online(config, source: str, tensor: int):
    """Prompts and responses of 512 tokens each, and a reward model trained on human preferences from the same model."""
    _wide(config, source, tensor, 512)
    config.reward_model.update(dtype="bfloat16", remat="full")
    config.prompts.update(source=PREFERENCES, count=0, template="{prompt}", length=512)
    config.sample.length = 512
    config.run.update(minibatches=4, epochs=1)
    config.optim.update(learning_rate=1e-6, decay="constant")
    config.gold.lexicon = ""
    config.evaluate.prompts = 512
    config.stages.reward.data.update(count=0, held_out=1024, length=1024)
    config.stages.reward.run.batch = 256
    return config


def llama3_8b(config):
    """PPO of Llama-3-8B, its critic a head on the policy."""
    return _online(config, LLAMA_3.format("8B"), tensor=8)


def ppo_70b(config):
    """PPO of Llama-3-70B; the reward model, and the critic that starts as it, are of 8B."""
    _online(config, LLAMA_3.format("70B"), tensor=8)
    config.stages.reward.model.source = LLAMA_3.format("8B")
    config.run.critic = "own"
    return config


def qwen2_7b(config):
    """GRPO of Qwen2-7B, as llama3_8b but for the model."""
    _wide(config, "Qwen/Qwen2-7B-Instruct", tensor=4, batch=512)
    return config


def _instructions(config, length: int, source_length: int = 0):
    source, prompt = "../shared/data/instruction/natural_instructions_train.jsonl.gz", "{definition}\n\n{input}"
    config.data.update(source=source, count=0, held_out=64, prompt=prompt, completion="{targets[0]}")
    config.data.update(length=length, source_length=source_length)
    config.optim.learning_rate = 1e-5
    return config


def t5_xxl(config):
    """SFT of T5-XXL (1.1)."""
    _wide(config, "google/t5-v1_1-xxl", tensor=8, batch=256)
    return _instructions(config, 128, source_length=512)


def sft_llama3_8b(config):
    """SFT of Llama-3-8B on packed rows of 2048 tokens."""
    _wide(config, LLAMA_3.format("8B"), tensor=1, batch=256)
    return _instructions(config, 2048)
