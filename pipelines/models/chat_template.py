"""Turns prompts, answers and dialogues into token ids: the one place, so that training and inference see the same.

What the model reads before an answer is what inference shows it: the template rendered up to there with its generation
prompt, tokenized as a whole. The answer follows as the template writes it behind that, closed by its EOS: reasoning,
tool calls and text alike. So for any tokenizer and template the ids before an answer are those of `encode_prompt`.

Where all of that is the beginning of what a later answer reads, both are learned from one sequence. Templates that show
an earlier turn otherwise than it was written (Qwen3 takes its `<think>` block away) give a sequence for each answer.
TRL's training templates are not used: they keep those blocks, so later answers would be learned after another prompt
than inference shows, and nothing here needs their `{% generation %}` marks.

The rules of a dialogue: all its messages go to the template as they are, two of one role in a row too; an assistant's
message with `learn: False` is read and not learned; what follows the last learned answer is left out; what the template
refuses or drops (a system message in the middle, a role, `tools`) is an error, never dropped in silence.

A plain string prompt is one user message. The template `plain` (also what a tokenizer without a template gets) puts
nothing around a message, so that prompt and completion are text that follow each other, closed by EOS.
"""

from __future__ import annotations

import json
import os
import re
from contextlib import contextmanager
from pathlib import Path

import jinja2

from pipelines import IGNORE_INDEX
from pipelines.errors import TemplateError
from pipelines.models.control_tokens import ControlTokens, control_tokens, encode_rendered

TEMPLATES = Path(__file__).parent / "templates"
PLAIN = (TEMPLATES / "plain.jinja").read_text()
SHOWN = ("role", "content", "reasoning_content", "tool_calls", "name", "tool_call_id")  # what templates may read
ONE_SEQUENCE = "one sequence for each dialogue"
PER_ANSWER = "one sequence for each answer, because the template shows earlier turns otherwise than they were written"
# What a template's code raises on a dialogue that it was not written for; its own refusals are jinja2's.
FAULTS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)


def as_messages(prompt) -> list[dict]:
    """A prompt in any accepted form (text, or a list of `{"role", "content"}`) as a list of messages."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def as_text(prompt) -> str:
    """A prompt or answer for people to read: its last message, or itself when it is text."""
    return prompt if isinstance(prompt, str) else prompt[-1].get("content") or ""


def encode_prompt(tokenizer, prompt, tools: list[dict] | None = None) -> list[int]:
    """Token ids that the model sees before it begins its answer (with the template's generation prompt).

    Raises `TemplateError` where the template refuses the dialogue or does not show all of it.
    """
    dialogue = Dialogue(tokenizer, as_messages(prompt), tools)
    dialogue.check_shown(len(dialogue.messages))
    return dialogue.before(len(dialogue.messages))[1]


def encode_answer(tokenizer, prompt, completion, tools: list[dict] | None = None) -> tuple[list[int], list[int]]:
    """`(prompt_ids, answer_ids)`: the answer ends in EOS, and nothing that the template puts after it is kept.

    `completion` is text, or messages of which the last is the assistant's; what is between them and the prompt's end
    counts as answer.
    """
    start = len(as_messages(prompt))
    dialogue = Dialogue(tokenizer, as_messages(prompt) + _completion(completion), tools)
    last = len(dialogue.messages) - 1
    dialogue.check_shown(last)
    ids, answer = dialogue.answer(last)
    first = dialogue.before(start)[1]
    return (first, ids[len(first) :] + answer) if ids[: len(first)] == first else (ids, answer)


def encode_dialogue(tokenizer, messages, tools: list[dict] | None = None) -> list[tuple[list[int], list[int]]]:
    """`(input_ids, labels)` of each sequence that a dialogue is learned from; none where no answer is to be learned.

    Labels are the ids of the assistant's answers with their EOS, else `IGNORE_INDEX`. Every answer is learned once.
    """
    dialogue = Dialogue(tokenizer, messages, tools)
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("learn", True)]
    if answers:
        dialogue.check_shown(answers[-1])
    sequences: list[tuple[list[int], list[int]]] = []
    for i in reversed(answers):
        ids, answer = dialogue.answer(i)
        whole = ids + answer
        if sequences and sequences[-1][0][: len(whole)] == whole:
            sequences[-1][1][len(ids) : len(whole)] = answer
        else:
            sequences.append((whole, [IGNORE_INDEX] * len(ids) + answer))
    return sequences[::-1]


def encode_row(tokenizer, row: dict) -> list[tuple[list[int], list[int]]]:
    """`encode_dialogue` of an sft row, `messages` or `prompt` and `completion` (of which the completion is learned).

    Raises `TemplateError` that names the row.
    """
    with naming(row):
        return encode_dialogue(tokenizer, dialogue_of(row), row.get("tools"))


@contextmanager
def naming(row: dict):
    """Let a `TemplateError` name the row that it is about."""
    try:
        yield
    except TemplateError as error:
        raise TemplateError(f"{row['where']}: {error}") from error


def dialogue_of(row: dict) -> list[dict]:
    """The messages of a row of any kind that has some; those of its prompt are not to be learned."""
    if "messages" in row:
        return row["messages"]
    prompt = [{**message, "learn": False} for message in as_messages(row["prompt"])]
    answers = [row["completion"]] if "completion" in row else row.get("completions", [])
    return prompt + [message for answer in answers for message in _completion(answer)]


def check_row(tokenizer, row: dict) -> None:
    """Raise `TemplateError`, which names the row, where the template refuses any of its dialogues or drops
    part of one.
    """
    with naming(row):
        if "completions" in row:
            for answer in row["completions"]:
                encode_answer(tokenizer, row["prompt"], answer, row.get("tools"))
        elif "messages" in row or "completion" in row:
            encode_dialogue(tokenizer, dialogue_of(row), row.get("tools"))
        else:
            encode_prompt(tokenizer, row["prompt"], row.get("tools"))


def shape(row: dict) -> tuple:
    """What of a row decides whether a template takes it: roles, the keys of messages, thoughts, tools."""
    messages = tuple(
        (m["role"], m.get("learn", True), "</think>" in (m.get("content") or ""), *sorted(k for k in SHOWN if m.get(k)))
        for m in dialogue_of(row)
    )
    return messages, bool(row.get("tools"))


def holds_control_text(tokenizer, row: dict) -> bool:
    """Whether a row's texts hold a control token's text, which they are then read without."""
    messages = [_shown(message) for message in dialogue_of(row)]
    return _control(tokenizer).found_in([*messages, *(row.get("tools") or [])])


def how_dialogues_are_learned(tokenizer) -> str:
    """`ONE_SEQUENCE` or `PER_ANSWER`: what a dialogue of two answers becomes under the tokenizer's template."""
    turns = [{"role": role, "content": text} for text in ("one", "two") for role in ("user", "assistant")]
    return ONE_SEQUENCE if len(encode_dialogue(tokenizer, turns)) == 1 else PER_ANSWER


def render_template(tokenizer, messages, add_generation_prompt: bool, tools: list[dict] | None = None) -> str:
    """The template's text for a dialogue; `TemplateError` with the template's own words where it refuses."""
    try:
        return tokenizer.apply_chat_template(
            messages,
            tools=tools or None,
            chat_template=None if tokenizer.chat_template else PLAIN,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except FAULTS as error:
        own = "refuses" if isinstance(error, jinja2.TemplateError) else "fails on"
        raise TemplateError(f"the chat template of {_name(tokenizer)} {own} this dialogue: {error}") from error


class Dialogue:
    """One dialogue under one template: what is read before each answer, and what is learned behind it."""

    def __init__(self, tokenizer, messages: list[dict], tools: list[dict] | None = None):
        self.tokenizer, self.control = tokenizer, _control(tokenizer)
        self.messages = self.control.marked([_shown(message) for message in messages])
        self.tools = self.control.marked(tools) if tools else None
        self._before: dict[int, tuple[str, list[int]]] = {}
        self._after: dict[int, str] = {}

    def before(self, i: int) -> tuple[str, list[int]]:
        """Text and ids of what inference shows before message `i`."""
        if i not in self._before:
            text = self._render(self.messages[:i], True)
            ids = encode_rendered(self.tokenizer, text)
            self._before[i] = text, _bos(self.tokenizer) + ids
        return self._before[i]

    def after(self, i: int) -> str:
        """The template's text up to message `i` and with it."""
        if i not in self._after:
            self._after[i] = self._render(self.messages[: i + 1], False)
        return self._after[i]

    def answer(self, i: int) -> tuple[list[int], list[int]]:
        """Ids of what is read before answer `i`, and of the answer with its EOS."""
        text, ids = self.before(i)
        answer = self._closed(i, self._answer_text(i))
        whole = _bos(self.tokenizer) + encode_rendered(self.tokenizer, text + answer)
        if whole[: len(ids)] == ids:
            return ids, whole[len(ids) :]
        # Characters on both sides of the seam make one token: the model has read the first side by itself.
        return ids, _continuation(self.tokenizer, answer)

    def check_shown(self, end: int) -> None:
        """Raise `TemplateError` unless the template shows all messages before `end`, the answer there, and the
        tools.
        """
        shown = self.before(end)[0]
        if self.tools:
            without = lambda: render_template(self.tokenizer, self.messages[:end], True)
            self._require(("tools",), shown, without, "`tools`")
        for i, message in enumerate(self.messages[: end + 1]):
            if message["role"] == "assistant":
                self._check_answer(i)
                continue
            role, content = message["role"], (message.get("content") or "").strip()
            usual = role == "user" or (role == "system" and i == 0)
            if content and not (usual and content in shown):
                other = [*self.messages[:i], {**message, "content": "something else"}, *self.messages[i + 1 : end]]
                place = " after another message" if role == "system" and i else ""
                what = f"message {i + 1}, of the role {role!r}{place}"
                self._require((role, i == 0), shown, lambda m=other: self._render(m, True), what)

    def _check_answer(self, i: int) -> None:
        """Raise `TemplateError` unless the template writes all that the assistant's message `i` holds."""
        message, before = self.messages[i], self.messages[:i]
        for key in ("tool_calls", "reasoning_content"):
            if message.get(key) and not (key == "reasoning_content" and opened_thought(self.before(i)[0])):
                other = [*before, {k: v for k, v in message.items() if k != key}]
                advice = ": put it into content between <think> and </think>" if key == "reasoning_content" else ""
                what = f"`{key}` of message {i + 1}{advice}"
                self._require(
                    (key, bool(message.get("content"))), self.after(i), lambda m=other: self._render(m, False), what
                )
        text = _thought(message)[1].strip()
        if text and text not in self.after(i):
            other = [*before, {**message, "content": "something else"}]
            self._require(None, self.after(i), lambda: self._render(other, False), f"the text of message {i + 1}")

    def _require(self, key, shown: str, without, what: str) -> None:
        """Raise `TemplateError` where `without()` renders as `shown`; what was once seen to be shown has a `key`."""
        if key is not None and key in self.control.known:
            return
        try:
            different = without() != shown
        except TemplateError:
            different = True  # the template asks for it
        if not different:
            raise TemplateError(
                f"the chat template of {_name(self.tokenizer)} does not show {what}; or use a template that does "
                "(model.chat_template)"
                if ":" in what
                else f"the chat template of {_name(self.tokenizer)} does not show {what}: take it out, or use a "
                "template that does (model.chat_template)"
            )
        if key is not None:
            self.control.known.add(key)

    def _answer_text(self, i: int) -> str:
        """What the template writes behind the prompt for answer `i`, up to its end."""
        before, after = self.before(i)[0], self.after(i)
        thought = _thought(self.messages[i])[0]
        opened = opened_thought(before)
        if after.startswith(before):
            answer = after[len(before) :]
            if opened and "<think>" in answer and "reasoning_content" not in self.messages[i]:
                # The thought in the text would come behind an empty one: the template takes it by its own key.
                moved = {**self.messages[i], "reasoning_content": thought, "content": _thought(self.messages[i])[1]}
                answer = self._render([*self.messages[:i], moved], False).removeprefix(before)
            if thought in answer:
                return answer
        elif opened and after.startswith(before[: opened.start()]):
            # DeepSeek-R1 begins every answer with `<think>`, and takes it from what it is given.
            rest = after[opened.start() :].lstrip("\n").removeprefix("<think>")
            return rest if "</think>" in rest else f"{thought}\n</think>\n\n{rest}"
        elif thought and before.rstrip().endswith("</think>"):
            raise TemplateError(
                f"message {i + 1} holds reasoning, but before an answer the template closes its thought (model."
                "chat_template_kwargs, or the template's default): leave one of the two out"
            )
        if thought and thought not in after:
            raise TemplateError(
                f"message {i + 1}: the chat template of {_name(self.tokenizer)} drops the reasoning of an answer, so "
                "it "
                "cannot be learned: leave it out of the row, or use a template that writes it (model.chat_template)"
            )
        # The template writes what came before otherwise than before an answer: the answer begins where another would
        # make a difference.
        other = self._render([*self.messages[:i], {"role": "assistant", "content": "\uf8ff"}], False)
        answer = after[len(os.path.commonprefix([after, other])) :]
        if not answer.strip():
            raise TemplateError(f"message {i + 1}: the chat template of {_name(self.tokenizer)} does not write answers")
        return answer

    def _closed(self, i: int, answer: str) -> str:
        """The answer up to the control token that ends it; what the template writes after that is cut."""
        eos = self.tokenizer.eos_token
        if eos is None:
            raise TemplateError(f"the tokenizer of {_name(self.tokenizer)} has no EOS token to end an answer with")
        outside = re.sub("\U000f0000.*?\U000f0001", lambda m: " " * len(m[0]), answer, flags=re.DOTALL)
        text = _thought(self.messages[i])[1].strip()
        behind = answer.rfind(text) + len(text) if text and text in answer else 0
        if (end := outside.find(eos, behind)) >= 0:  # the first: Phi-3 writes another at the end of a dialogue
            return answer[: end + len(eos)]
        written = list(self.control.turns.finditer(outside.rstrip()))
        if written and written[-1].end() == len(outside.rstrip()):
            return answer.rstrip()  # Llama 3.1 ends a tool call with `<|eom_id|>`
        follow = _closing(self.tokenizer, self.control, self.messages[: i + 1], self.tools)
        if follow is None:
            raise TemplateError(
                f"the chat template of {_name(self.tokenizer)} does not end an answer with the EOS token {eos!r}: the "
                "model would never learn to stop. Use `chat_template: chatml`, or set the tokenizer's EOS to the token "
                "with which the template closes an answer."
            )
        return answer + follow

    def _render(self, messages: list[dict], add_generation_prompt: bool) -> str:
        return render_template(self.tokenizer, messages, add_generation_prompt, self.tools)


def _closing(tokenizer, control: ControlTokens, messages: list[dict], tools) -> str | None:
    """The control token that the next turn begins with, which then ends an answer (GLM's `<|user|>`); or None."""
    called = messages[-1].get("tool_calls")
    turn = {"role": "tool" if called else "user", "content": "x"}
    try:
        ended = render_template(tokenizer, messages, False, tools)
        following = render_template(tokenizer, [*messages, turn], False, tools)
    except TemplateError:
        return None
    if following.startswith(ended):
        rest = following[len(ended) :]
    else:  # the next turn changes what was written before (GLM takes the thought away): look behind a plain answer
        plain = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "\uf8fe"}, turn]
        try:
            rest = render_template(tokenizer, plain, False, tools).rpartition("\uf8fe")[2]
        except TemplateError:
            return None
    token = control.turns.match(rest.lstrip())
    return token[0] if token else None


def opened_thought(before: str) -> re.Match | None:
    """Where a prompt ends in the beginning of a thought."""
    return re.search(r"<think>\s*\Z", before)


def _thought(message: dict) -> tuple[str, str]:
    """`(reasoning, the answer without it)` of an assistant's message, wherever the row holds the reasoning."""
    content = message.get("content") or ""
    if message.get("reasoning_content"):
        return message["reasoning_content"].strip(), content
    if "</think>" in content:
        thought, _, text = content.partition("</think>")
        return thought.rpartition("<think>")[2].strip(), text
    return "", content


def _shown(message: dict) -> dict:
    """What a template reads of a message; arguments of tool calls as mappings, which is how transformers has them."""
    shown = {key: message[key] for key in SHOWN if message.get(key) is not None}
    if shown.get("tool_calls"):
        shown["tool_calls"] = [_with_mapping(call) for call in shown["tool_calls"]]
    return shown


def _with_mapping(call: dict) -> dict:
    if isinstance(call.get("function"), dict):
        return {**call, "function": _with_mapping(call["function"])}
    if isinstance(call.get("arguments"), str):
        try:
            arguments = json.loads(call["arguments"])
        except ValueError:
            return call
        return {**call, "arguments": arguments} if isinstance(arguments, dict) else call
    return call


def _completion(completion) -> list[dict]:
    return [{"role": "assistant", "content": completion}] if isinstance(completion, str) else list(completion)


def _name(tokenizer) -> str:
    return repr(tokenizer.name_or_path or type(tokenizer).__name__)


def _control(tokenizer) -> ControlTokens:
    def around() -> str:
        """What stands around a user's text in the middle of a dialogue."""
        turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "\uf8fe"}]
        try:
            return render_template(tokenizer, [*turns, {"role": "user", "content": "x"}], False).rpartition("\uf8fe")[2]
        except TemplateError:
            return ""

    return control_tokens(tokenizer, around)


def _bos(tokenizer) -> list[int]:
    """A template writes its own BOS; plain text gets the tokenizer's, at its very beginning."""
    if tokenizer.chat_template and tokenizer.chat_template != PLAIN:
        return []
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("x")["input_ids"][:1] == [bos] else []


def _continuation(tokenizer, text: str) -> list[int]:
    """Ids of a text that goes on another, without the space that a sentencepiece puts before what it begins with."""
    for anchor in ("\n", "."):
        before = encode_rendered(tokenizer, anchor)
        ids = encode_rendered(tokenizer, anchor + text)
        if ids[: len(before)] == before:
            return ids[len(before) :]
    return encode_rendered(tokenizer, text)
