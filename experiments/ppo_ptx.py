"""PPO-ptx: python -m experiments.ppo_ptx --config=configs/ppo_ptx.py

PPO and, in the same update, the log-likelihood of text (InstructGPT eq. 2), so that what the policy knew before is not lost.
"""

from functools import partial

from experiments import common, launch, ppo
from jaxalign import shard
from jaxalign.data import tables, text
from jaxalign.objectives.online import Mixed, mixed, scaled
from jaxalign.objectives.supervised import sft


def objective(config, model):
    one = ppo.PPO.objective(config, model)
    return partial(mixed, model=model, objective=one, other=sft, other_weight=config.pretraining.weight)


def pretraining(config, policy, mesh):
    """-> (i) -> the Batch of text of update i: as many rows, packed, as the update has of responses."""
    if common.start_of(policy.model) is not None:
        raise ValueError("PPO-ptx learns from plain text, which is for a decoder: this model is an encoder-decoder")
    source, length = config.pretraining.source, config.pretraining.length
    rows = common.read_rows(source, config.pretraining.count, seed=config.seed)

    def make(row):
        return text.plain(policy.tokenizer, text.fill(config.pretraining.template, row))

    packed = tables.pack(common.collect(rows, make, length=length, source=source).documents, length)
    many = config.run.batch // config.run.minibatches

    def at(i):
        numbers = tables.order(len(packed), many, seed=config.seed, step=i)
        batch = tables.check(tables.pack_rows([packed[n] for n in numbers], length), policy.model.config.vocab)
        return shard.place(batch, mesh)

    return at


PPO_PTX = ppo.PPO._replace(
    objective=objective,
    data=lambda config, model: lambda rolled, batch: Mixed(rolled, scaled(batch, rolled.batch.targets.sum())),
    together=lambda config: 1,  # nor is text like text
    beside=pretraining,
)

if __name__ == "__main__":
    launch.main(partial(ppo.run, algorithm=PPO_PTX), "ppo_ptx")
