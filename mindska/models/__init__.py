"""Networks, one file a paper, registered in MindCV's factory."""

from . import skanet

__all__ = ["skanet"]
