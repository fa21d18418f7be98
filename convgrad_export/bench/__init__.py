"""Layers of published networks, and measuring lowerings on them."""
