"""Aligning language models, as pure functions. The programs in experiments/ are made of these:

    from functools import partial

    import jax
    import jax.numpy as jnp

    from jaxalign import models, score
    from jaxalign.data import tables, text
    from jaxalign.models import checkpoints
    from jaxalign.objectives import supervised
    from jaxalign.sample import sample
    from jaxalign.train import optim
    from jaxalign.train.step import make_step
    from jaxalign.types import TrainState

    config, params = checkpoints.load(source)  # a folder, a hub id, a .gguf file, or a run
    model, tokenizer = models.build(config), checkpoints.tokenizer(source)

    batch = tables.pad([text.prompt_completion(tokenizer, "Once", " upon a time.")], 32)
    said, _ = score.evaluate(model, params, batch)  # said.logp [B,T]: of tokens[:, t]

    tx = optim.adam(learning_rate=1e-4, steps=100)
    state = TrainState(jnp.int32(0), jax.tree.map(jnp.asarray, params), tx.init(params))
    step = jax.jit(make_step(partial(supervised.sft, model=model), tx))
    state, metrics = step(state, batch)

    prompts = tables.pad([text.prompt_completion(tokenizer, "Once", "", eos=False)], 8, side="left")
    keys = jax.random.split(jax.random.key(0), 1)
    drawn, logp, _ = sample(model, state.params, keys, prompts, length=16, eos=tokenizer.eos_token_id)
    checkpoints.export("mine", config, jax.device_get(state.params), tokenizer=tokenizer)

Over several devices `shard.create` makes the state where it belongs, and `shard.compile_step` compiles the step.
"""
