"""Composable experiments with sparse language models."""

__version__ = "0.1.0"
