"""Any task of lm-evaluation-harness (pip install -e ".[eval]"), asked of a model here.

    python -m experiments.harness --config=configs/harness.py --config.model.source=runs/sft --config.tasks=stories,choices

prints the harness's table. Its results are in results.json of the workdir, and in records.jsonl a line for each example, as
jaxalign.evaluation.records reads them. Answers are kept in a file for each model, so that the same command goes on where it
stopped. Tasks are code, for a .yaml may name Python functions; so is that file, which the harness unpickles. In Python:

    lm_eval.simple_evaluate(model=Harness(loaded, mesh, batch=8), tasks=["gsm8k"])
"""

import os
import zlib
from functools import cache, partial

import jax

from experiments import common, launch
from jaxalign import keys, shard
from jaxalign.data import templates, text
from jaxalign.evaluation import engine, records
from jaxalign.train import log

try:
    import lm_eval
    from lm_eval.api.model import LM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table
except ImportError as error:
    raise ImportError('this runs tasks of lm-evaluation-harness: pip install -e ".[eval]"') from error


class Harness(LM):
    """A model (common.load) as the harness asks it. Texts are tokenised as its own back end for transformers does it.

    Args:
        length: most tokens of the model; 0: all it was made for. What is longer loses its start, and is counted in `cut`.
        seed: of what is sampled; a request's draws are keyed by its own tokens, whatever else is asked.
    """

    def __init__(self, loaded: common.Loaded, mesh, *, batch: int, length: int = 0, seed: int = 0):
        super().__init__()
        self.model, self.params, self.tokenizer = loaded.model, loaded.params, loaded.tokenizer
        self.tokenizer_digest, self.start = loaded.tokenizer_digest, common.start_of(loaded.model)
        self.length = engine.longest(loaded.model, length)
        self.key, self.cut = keys.key(seed, "evaluate"), 0
        self.score = engine.scorer(self.model, mesh, batch=batch, length=self.length)
        make = partial(engine.generator, self.model, mesh, self.tokenizer, batch=batch, context=self.length)
        self.generator = cache(lambda settings: make(**dict(settings)))

    def loglikelihood(self, requests, disable_tqdm: bool = False):
        asked = [request.args for request in requests]

        def tell(n, said):
            self.cache_hook.add_partial("loglikelihood", asked[n], (said.logp, said.greedy))

        said = self.score(self.params, [self._document(*pair) for pair in asked], tell)
        self.cut += sum(one.cut for one in said)
        return [(one.logp, one.greedy) for one in said]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False):
        if self.start is not None:
            raise ValueError("an encoder-decoder has no log-probability of a text without a source")
        texts, prefix = [engine.encoded(self.tokenizer, *request.args) for request in requests], engine.prefix_of(self.tokenizer)
        return [one.logp for one in engine.rolling(self.score, self.params, texts, length=self.length, prefix=prefix)]

    def generate_until(self, requests, disable_tqdm: bool = False):
        asked, answers = [request.args for request in requests], {}
        settings = [_settings(given) for _, given in asked]
        for one in dict.fromkeys(settings):
            numbers, (until, sampling) = [n for n, other in enumerate(settings) if other == one], one

            def tell(k, written, numbers=numbers):
                self.cache_hook.add_partial("generate_until", asked[numbers[k]], written.text)

            prompts = [self._prompt(asked[n][0]) for n in numbers]
            row_keys = keys.of_rows(self.key, [zlib.crc32(prompt.ids) >> 1 for prompt in prompts])
            written = self.generator(sampling)(self.params, row_keys, prompts, until, tell)
            self.cut += sum(x.cut for x in written)
            answers |= dict(zip(numbers, [x.text for x in written]))
        return [answers[n] for n in range(len(requests))]

    def apply_chat_template(self, chat_history, add_generation_prompt: bool = True):
        (rendered,) = templates.render(self.tokenizer, chat_history, [(len(chat_history), add_generation_prompt)])
        if add_generation_prompt:
            return rendered
        said = chat_history[-1]["content"]  # to be continued: what a template writes behind it goes
        said = said if said in rendered else said.strip()
        return rendered[: rendered.rindex(said) + len(said)]

    def chat_template(self, chat_template=False):
        return self.tokenizer.chat_template if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer_digest

    def _document(self, context: str, continuation: str) -> text.Document:
        if self.start is None:
            return engine.whole(self.tokenizer, context, continuation)
        return text.source_target(self.tokenizer, context, continuation, start=self.start, eos=False)

    def _prompt(self, context: str) -> text.Document:
        if self.start is None:
            ids = engine.encoded(self.tokenizer, context) or [engine.prefix_of(self.tokenizer)]
            return text.of_ids(ids, [], vocab=len(self.tokenizer))
        return text.source_target(self.tokenizer, context, "", start=self.start, eos=False)


def _settings(given: dict) -> tuple:
    """generation_kwargs of a task. -> its stop strings, and items of engine.generator's settings.

    Raises ValueError for those that nothing here would read.
    """
    given = dict(normalize_gen_kwargs(given))
    until, drawn, temperature = tuple(given.pop("until")), given.pop("do_sample"), given.pop("temperature", 1.0)
    settings = {"length": given.pop("max_gen_toks"), "temperature": temperature if drawn else 0.0}
    settings |= {"top_k": given.pop("top_k", 0), "top_p": given.pop("top_p", 1.0)}
    if given:
        raise ValueError(f"generation_kwargs: {', '.join(given)} is read by nothing here; what is: until, {', '.join(settings)}")
    return until, tuple(settings.items())


def run(config, workdir):
    mesh = shard.make_mesh(**config.mesh)
    loaded = common.load(config.model.source, config.model, mesh, seed=config.seed)
    lm = Harness(loaded, mesh, batch=config.batch, length=config.length, seed=config.seed)
    about = records.fingerprint(loaded.digest, loaded.tokenizer_digest, config.model.dtype, config.length, config.seed)
    os.environ["DISABLE_MULTIPROC"] = "1"  # the harness's bootstrap would fork this process, and its JAX would hang
    tasks = config.tasks.split(",")
    manager = TaskManager(include_path=config.folder or None, include_defaults=False)
    if not {*tasks} <= {*manager.all_tasks}:
        manager = TaskManager(include_path=config.folder or None)  # takes seconds: thousands of files
    results = lm_eval.simple_evaluate(
        model=lm,
        model_args={"source": config.model.source, "digest": loaded.digest},
        tasks=tasks,
        num_fewshot=config.shots,
        limit=config.limit or None,
        apply_chat_template=config.chat,
        use_cache=str(workdir / f"answers_{about}") if jax.process_count() == 1 else None,  # processes must ask for the same
        task_manager=manager,
        bootstrap_iters=1000,
    )
    samples = results.pop("samples")
    log.write_json(workdir / "results.json", results)
    found = (record for task in samples for record in _records(task, samples[task], loaded.digest))
    launch.write_rows(workdir / "records.jsonl", found)
    log.say(make_table(results) + (make_table(results, "groups") if "groups" in results else ""))
    if lm.cut:
        log.say(f"{lm.cut} of the requests now made were longer than the {lm.length} tokens of the model, and lost their start")


def _records(task: str, samples: list[dict], digest: str) -> list[dict]:
    """The harness's lines as records, one an example, its metrics by the names of the results: "acc,none"."""
    found = {}
    for line in samples:
        about = {"task": task, "id": line["doc_id"], "prompt": records.fingerprint(line["arguments"]), "model": digest}
        told = {"asked": line["arguments"][0][0], "answers": line["resps"], "target": line["target"]}
        metrics = {f"{name},{line['filter']}": line[name] for name in line["metrics"]}
        found.setdefault(line["doc_id"], about | told).update(metrics)
    return list(found.values())


if __name__ == "__main__":
    launch.main(run, "harness")
