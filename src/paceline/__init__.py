"""paceline: train draft models for speculative decoding against a frozen target that runs anywhere."""

from paceline.version import VERSION

__version__ = VERSION
__all__ = ["__version__"]
