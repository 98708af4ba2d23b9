"""A recipe that changes nothing: the defaults of every field."""

from sedd.configuration.config import Config


def get_config() -> Config:
    """The defaults."""
    return Config()
