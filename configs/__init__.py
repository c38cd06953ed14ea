"""Settings. Each file's get_config(variant) gives all of an experiment's; a key that is not here is a mistake."""

MESH = {"data": -1, "fsdp": 1, "tensor": 1, "sequence": 1}  # devices of each axis (jaxalign/shard.py); -1: those that are left

MODEL = {  # of a model that is there, or that will be; a config says its source beside
    "tokenizer": "",  # a folder or hub id; "": the source's own
    "dtype": "float32",  # of activations and of weights as they are used; bfloat16, float16
    "remat": "dots",  # what a layer's backward pass computes again: all but products with weights and attention; none; full
    "attention": "xla",  # blocks (long or packed rows), cudnn (GPUs), splash (TPUs), ring (mesh.sequence > 1): the same numbers
}

LOOP = {
    "log_every": 10,  # updates
    "save_every": 100,
    "save_seconds": 600.0,
    "keep": 2,  # the last checkpoints
    "keep_every": 0,  # and those of multiples of this
    "best": "",  # and the best by this metric of a held-out set; "-nll/held_out" where less is better
    "verify": True,  # compare digests of what is read; takes seconds where a model is large
    "patience": 10,  # updates skipped in a row that end the run
    "stuck_seconds": 1800.0,  # a step that takes longer, and 20 times longer than any before, ends the run
    "sinks": (),  # "tensorboard", "wandb"
}

GUARD = {"sigmas": 0.0, "window": 100}  # std of the gradient norms of the last `window` updates: how many make a spike; 0: none

ADAPTER = {  # what is trained of a model that is there
    "kind": "none",  # all of it; lora, ia3, prefix, prompt, last (layers), head (the scalar head, which all of them train, alone)
    "source": "",  # lora, ia3, prefix, prompt: a folder of PEFT's or of a run, whose adapter is trained on, as it is there
    "targets": "attention|mlp",  # lora, ia3: regular expression for names of dense layers: layers.attention.q, layers.mlp.down
    "rank": 16,  # lora
    "alpha": 32.0,  # lora: x A B comes times alpha/rank
    "rank_stabilised": False,  # lora: times alpha/sqrt(rank)
    "length": 16,  # prefix, prompt: tokens
    "layers": 2,  # last
}


def made_before(config, made):
    """The stages before this one: those before `made`, no more its own, and `made`, the comparisons; all follow config."""
    config.stages = {**made.stages, "compare": made}
    del made.stages
    for stage in config.stages.values():
        follow(config, stage)
    follow(config, made, "model")


def follow(config, stage, *sections):
    """The stage's seed, mesh and these sections say what the config's say, also where they are changed."""
    stage.seed = config.get_oneway_ref("seed")
    for section in ("mesh", *sections):
        for key in config[section]:
            stage[section][key] = config[section].get_oneway_ref(key)
