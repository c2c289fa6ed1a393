"""Exported files against the original, on held-out data."""
