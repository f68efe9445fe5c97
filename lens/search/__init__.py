"""Embeddings -> ranked documents."""

from lens.search.exact import search

__all__ = ["search"]
