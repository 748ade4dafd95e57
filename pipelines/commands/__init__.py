"""One module per verb of the command line, each with `main(argv) -> exit code`; thin."""

import argparse
import textwrap


def command_line(verb: str, about: str, examples: str, **settings) -> argparse.ArgumentParser:
    """The parser of a verb whose `--help` says what it does and ends in `examples`, one command a line."""
    pairs = [line.strip().partition("   ") for line in examples.strip().splitlines()]
    width = max((len(command) for command, _, meaning in pairs if meaning), default=0) + 3
    lines = [f"  {command:<{width}}{meaning.strip()}".rstrip() for command, _, meaning in pairs]
    return argparse.ArgumentParser(
        prog=f"pipelines {verb}",
        description=about if "\n" in about else textwrap.fill(about, 110),
        epilog="examples\n" + "\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **settings,
    )


def split_words(words: list[str]) -> tuple[list[str], list[str]]:
    """`(stage names, overrides)` of what stands behind a recipe on the command line."""
    return [w for w in words if "=" not in w], [w for w in words if "=" in w]
