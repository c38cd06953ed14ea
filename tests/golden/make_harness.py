"""Makes harness/stories260k.json: what the back end for transformers of lm-evaluation-harness answers, float32, as stories260k.

    python tests/golden/make_harness.py        from the root of the repository, with the folder `shared` beside it

wants torch, transformers and lm_eval. `requests` are single ones, of a model that reads at most 48 tokens; `tasks` what its own
simple_evaluate found on the first rows of configs/harness/*.yaml.
"""

import json
from importlib.metadata import version
from pathlib import Path

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

HERE, MODEL = Path(__file__).parent, "../shared/data/models/stories260k"
LONG = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park with her dog Max. One day,"
REQUESTS = {
    "loglikelihood": [
        *(("The cat sat on the", end) for end in (" mat", " bed.", " bed and slept.")),
        *(("Question: Is the sky blue? Answer:", f" {letter}") for letter in "ABCDEFGHIJ"),
        ("A space at the end ", "goes on."),
        ("", "Once upon a time"),
        (LONG, " they saw a big, red ball. Max wanted to play with it."),
    ],
    "loglikelihood_rolling": [("The end.",), (f"{LONG} they saw a big, red ball.\nMax wanted to play with it!",)],
    "generate_until": [
        *((start, {"until": ["."], "max_gen_toks": 24}) for start in ("Once upon a time", "Tom and his friend", LONG)),
        ("The end", {"until": ["\n", "said, ", "said"], "max_gen_toks": 24, "do_sample": False}),
        ("One day", {"until": [], "max_gen_toks": 24}),
    ],
}
TASKS, LIMIT = ["local_mmlu", "local_tinystories", "local_gsm8k"], 2


def main():
    one = HFLM(pretrained=MODEL, dtype="float32", device="cpu", batch_size=4, max_length=48)
    found = {}
    for kind, asked in REQUESTS.items():
        instances = [Instance(kind, {}, arguments, n) for n, arguments in enumerate(asked)]
        found[kind] = [[*arguments, answer] for arguments, answer in zip(asked, getattr(one, kind)(instances))]
    whole = HFLM(pretrained=MODEL, dtype="float32", device="cpu", batch_size=4)
    manager = TaskManager(include_path="configs/harness", include_defaults=False)
    results = lm_eval.simple_evaluate(model=whole, tasks=TASKS, limit=LIMIT, task_manager=manager, bootstrap_iters=0)
    answers = {task: [line["resps"] for line in results["samples"][task]] for task in TASKS}
    scores = {task: {name: x for name, x in results["results"][task].items() if isinstance(x, float)} for task in TASKS}
    source = ", ".join(f"{name} {version(name)}" for name in ("lm_eval", "transformers", "torch"))
    (HERE / "harness").mkdir(exist_ok=True)
    case = {"requests": found, "tasks": {"answers": answers, "scores": scores, "limit": LIMIT}, "source": source}
    (HERE / "harness" / "stories260k.json").write_text(json.dumps(case))


if __name__ == "__main__":
    main()
