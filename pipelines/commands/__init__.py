"""One module per verb of the command line, each with `main(argv) -> exit code`; thin."""


def split_words(words: list[str]) -> tuple[list[str], list[str]]:
    """`(stage names, overrides)` of what stands behind a recipe on the command line."""
    return [w for w in words if "=" not in w], [w for w in words if "=" in w]
