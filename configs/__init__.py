"""Settings. Each file's get_config(variant) gives all of an experiment's; a key that is not here is a mistake."""
