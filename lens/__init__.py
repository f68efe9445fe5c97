"""LENS: lexicon-based text embeddings whose every dimension is a readable cluster of tokens."""

__version__ = "0.1.0"

from lens.encoder import LENS, encode, load

__all__ = ["LENS", "__version__", "encode", "load"]
