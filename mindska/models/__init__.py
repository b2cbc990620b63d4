"""Networks, one file a paper, registered in MindCV's factory."""

from . import skanet, sknet, van

__all__ = ["skanet", "sknet", "van"]
