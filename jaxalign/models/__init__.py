"""Language models: the only rooms that know Flax. Everything else sees the `types.Model` record."""
