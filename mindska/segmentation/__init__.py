"""Semantic segmentation: networks on our backbones, and their data and figures."""
