"""What a result must say about where it was measured."""

from convgrad_export.bench.environment import environment

__all__ = ["environment"]
