"""Pipelines as TOML, YAML and JSON files: read, checked whole, written, and read back."""
