"""Corpora, tokenizers, the packed token files made of the two, and the batches read from those."""
