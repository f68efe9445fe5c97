"""LENS: lexicon-based text embeddings whose every dimension is a readable cluster of tokens."""

import logging
from typing import TYPE_CHECKING, Any

# peft imports bitsandbytes where it is installed, which then warns on stderr of every CPU kernel that it lacks.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lens.encoder import LENS, encode, load

__all__ = ["LENS", "__version__", "encode", "load"]


def __getattr__(name: str) -> Any:
    """Imports torch and transformers only when a model is asked for: programs that need files alone start fast."""
    if name not in ("LENS", "encode", "load"):
        raise AttributeError(f"module 'lens' has no attribute {name!r}")
    from lens import encoder

    return getattr(encoder, name)
