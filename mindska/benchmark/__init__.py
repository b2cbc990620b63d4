"""Speed, memory and cost of our networks, and of the PyTorch references beside them, on this machine."""
