"""Language models: the only rooms that know Flax. Everything else sees the `types.Model` record."""

from jaxalign.models import decoder, encdec
from jaxalign.models.decoder import DecoderConfig
from jaxalign.models.encdec import EncDecConfig
from jaxalign.types import Model

Config = DecoderConfig | EncDecConfig


def build(config: Config) -> Model:
    """The model of this architecture, as pure functions."""
    return (encdec if isinstance(config, EncDecConfig) else decoder).build(config)


def config_of(fields: dict) -> Config:
    """The architecture that these fields say, as `dataclasses.asdict` wrote them: an encoder-decoder's have `encoder_layers`."""
    return (EncDecConfig if "encoder_layers" in fields else DecoderConfig)(**fields)
