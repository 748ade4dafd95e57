"""`python -m pipelines`, for `accelerate launch`, that writes into $WATCHED what each process encoded and was
handed.
"""

import json
import os

from pipelines.__main__ import entry
from pipelines.data import streaming, token_file
from pipelines.models import chat_template

encode_answer, bare, handed_out = chat_template.encode_answer, token_file.plain_encoder, streaming.Stream.__iter__


def note(kind: str, value) -> None:
    """Add a line to this process's file of that kind."""
    with open(os.path.join(os.environ["WATCHED"], f"{kind}-{os.environ.get('RANK', '0')}.jsonl"), "a") as stream:
        stream.write(json.dumps(value) + "\n")


def encode_answer_noted(tokenizer, prompt, completion, *more):
    """`chat_template.encode_answer`."""
    note("encoded", completion)
    return encode_answer(tokenizer, prompt, completion, *more)


def bare_noted(tokenizer):
    """`token_file.plain_encoder`: the encoder it gives notes every text."""
    inner = bare(tokenizer)

    class Noted:
        def __enter__(self):
            encode = inner.__enter__()
            return lambda batch: [note("encoded", text) for text in batch] and encode(batch)

        def __exit__(self, *error):
            return inner.__exit__(*error)

    return Noted()


def handed_out_noted(self):
    """`Stream.__iter__`: notes the number and the rows of every item."""
    for item in handed_out(self):
        note("handed", [int(item["row"]), self.names[int(item["row"])]])
        yield item


if __name__ == "__main__":
    chat_template.encode_answer, token_file.plain_encoder = encode_answer_noted, bare_noted
    streaming.Stream.__iter__ = handed_out_noted
    entry()
