"""The words that tiny tokenizers and rows of the tests are made of."""

WORDS = (
    "the a cat dog bird sees likes eats red green blue big small fish tree and is not very what colour of in on".split()
)
