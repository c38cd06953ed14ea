"""Settings. Each file's get_config(variant) gives all of an experiment's; a key that is not here is a mistake."""

LOOP = {"log_every": 10, "save_every": 100, "save_seconds": 600.0, "keep": 2, "sinks": ()}  # sinks: "tensorboard", "wandb"


def follow(config, stage, *sections):
    """The stage's seed, mesh and these sections say what the config's say, also where they are changed."""
    stage.seed = config.get_oneway_ref("seed")
    for section in ("mesh", *sections):
        for key in config[section]:
            stage[section][key] = config[section].get_oneway_ref(key)
