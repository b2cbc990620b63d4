"""Networks, one file a paper, registered in MindCV's factory."""

from . import sk_resnet, skanet, sknet, van

__all__ = ["sk_resnet", "skanet", "sknet", "van"]
