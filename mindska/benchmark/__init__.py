"""Speed, memory and cost of our networks, and of the PyTorch references beside them, on this machine."""

MODELS = ("skanet_s", "van_tiny_lska_k7", "van_tiny_lska_k23", "van_tiny_lska_k53", "sknet50")
WHAT = ("forward", "folded", "train")
