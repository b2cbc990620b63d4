"""Layers of the networks: what papers share, and what would make a network's file too long to be read at once."""
