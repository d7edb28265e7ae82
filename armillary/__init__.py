"""Armillary: train large image+text transformers, and predict how the large run will end from small ones."""

__version__ = "0.1.0"
