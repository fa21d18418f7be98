"""Emitters: one description of a gradient, one module for each target."""
