"""Models and tokenizers, in and out."""
