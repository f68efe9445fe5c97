"""Vocabulary clustering: the rows of a language model's head become K clusters of tokens."""
