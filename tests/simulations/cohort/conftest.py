"""Small encoders and configurations: those of the tests of tuning."""

from tests.client.tuning.conftest import encoders, make_config, randomise

__all__ = ["encoders", "make_config", "randomise"]
