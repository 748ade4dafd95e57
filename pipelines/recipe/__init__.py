"""YAML to a checked recipe."""
