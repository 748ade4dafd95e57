"""Dialogues of rows: messages in every accepted form to one shape, the order they must keep, prompts and answers.

A message comes out as `{"role", "content"}` with role system, developer, user, assistant or tool and content text, and
where the row has them `reasoning_content`, `tool_calls`, `name`, `tool_call_id`; `"learn": False` marks an assistant
message that must not be learned. The rules are written for users in docs/data-formats.md.
"""

from __future__ import annotations

import json
import math
import re

from pipelines.errors import DataError

SPEAKERS = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
    **{"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"},
    **{"observation": "tool", "function_response": "tool", "function_call": "function_call"},
}
SYSTEM = ("system", "developer")
PLAIN = ("user", "assistant", "system")
# Names under which public formats mark what of a dialogue is learned: OpenAI, axolotl, ms-swift, xtuner, LLaMA-Factory,
# verl; and torchtune's for the opposite.
LEARNED = (
    *("weight", "loss", "train", "training", "trainable", "learn", "loss_weight", "loss_mask", "loss_scale"),
    *("compute_loss", "calculate_loss", "has_loss", "with_loss", "is_training", "do_train", "train_on", "learnable"),
)
NOT_LEARNED = (
    "masked",
    "ignore",
    "ignored",
    "ignore_loss",
    "no_loss",
    "skip_loss",
    "no_train",
    "skip_train",
    "exclude",
)
MARK = re.compile("weight|loss|train|learn|mask|ignore|skip|exclude|target|supervis|grad|label", re.IGNORECASE)
REASONING = ("reasoning_content", "reasoning", "thinking")
# What could not be read as text, and columns that change what a template writes: an error, not an ignored column.
NOT_TEXT = ("images", "image", "videos", "video", "audios", "audio")
INSTEAD = {
    "functions": "is the old name of tools: rename it",
    "function_call": "is the old form of tool_calls: write [{function: {name, arguments}}] there",
    "chat_template_kwargs": "cannot differ from row to row: set model.chat_template_kwargs in the recipe, and drop it",
}
HH = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")  # Anthropic HH: whole dialogues as text
DEPTH = 64  # of nested lists and objects in tools and their arguments


def type_name(value) -> str:
    """What a value is, in an error text."""
    return "null" if value is None else type(value).__name__


def text(value, column: str) -> str:
    """A text that holds more than blanks; raises `DataError` for anything else."""
    if type(value) is str:
        if value and not value.isspace():
            return value
        raise DataError(f"{column} is empty")
    if value is None:
        raise DataError(f"{column} is empty")
    raise DataError(f"{column} must be text, not {type_name(value)}")


def written_list(value) -> str:
    """A hint for a text where a list is due: what CSV makes of one."""
    if not isinstance(value, str) or value.strip()[:1] not in ("[", "{"):
        return ""
    return ". The text looks like a list written into a cell, as CSV does it: write the rows as JSON lines"


def messages(value, column: str, ignored: set[str]) -> list[dict]:
    """A list of messages in their one shape; their order is not looked at. `ignored` gets the names of unused keys."""
    if not isinstance(value, list):
        raise DataError(
            f"{column} must be a list of messages with role and content, not {type_name(value)}{written_list(value)}"
        )
    if not value:
        raise DataError(f"{column} is empty: it holds no message")
    out = []
    for i, message in enumerate(value, 1):
        if type(message) is dict and len(message) == 2:
            role, content = message.get("role"), message.get("content")
            if role in PLAIN and type(content) is str and content and not content.isspace():
                out.append({"role": role, "content": content})
                continue
        out.append(_message(message, column, i, ignored))
    return out


def _message(message, column: str, number: int, ignored: set[str]) -> dict:
    where = f"{column}: message {number}"
    if not isinstance(message, dict):
        raise DataError(f"{where} must be an object with role and content, not {type_name(message)}")
    rest = {key: value for key, value in message.items() if value is not None}
    role = rest.pop("role" if "role" in rest else "from", None)
    if role is None:
        raise DataError(f"{where} has no role")
    if not isinstance(role, str) or role not in SPEAKERS:
        raise DataError(f"{where}: unknown role {role!r}; known: {', '.join(SPEAKERS)}")
    where, role = f"{where} ({role})", SPEAKERS[role]
    content = _content(rest.pop("content" if "content" in rest else "value", None), where, column, ignored)
    out: dict = {"role": role, "content": content}
    if role == "function_call":
        out = {"role": "assistant", "content": "", "tool_calls": _calls(content, f"{where}: content", ignored)}
    elif role == "assistant":
        for key in REASONING:
            thought = rest.pop(key, None)
            if thought is None or isinstance(thought, str) and not thought.strip():
                continue
            if "reasoning_content" in out:
                raise DataError(f"{where} has its reasoning twice: {', '.join(k for k in REASONING if k in message)}")
            out["reasoning_content"] = text(thought, f"{where}: {key}")
        if calls := rest.pop("tool_calls", None):
            out["tool_calls"] = _calls(calls, f"{where}: tool_calls", ignored)
    elif rest.get("tool_calls"):
        raise DataError(f"{where}: only the assistant makes tool_calls")
    for key in ("name", "tool_call_id"):
        if key in rest:
            out[key] = text(rest.pop(key), f"{where}: {key}")
    if not _learned(rest, where, out["role"]):
        out["learn"] = False
    _unused(rest, where, f"{column}[].", ignored)
    blank = not content or content.isspace()
    if blank and (out["role"] == "user" or out["role"] == "assistant" and "tool_calls" not in out):
        beside = " beside its reasoning" if "reasoning_content" in out else ""
        raise DataError(f"{where} is empty{beside}")
    return out


def _content(value, where: str, column: str, ignored: set[str]) -> str:
    """The text of a message; parts of text are joined with nothing between them."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise DataError(f"{where}: content must be text, not {type_name(value)}")
    found = []
    for i, part in enumerate(value, 1):
        if not isinstance(part, dict):
            raise DataError(f"{where}: part {i} of the content must be an object with a type, not {type_name(part)}")
        if part.get("type") not in ("text", "input_text", "output_text"):
            raise DataError(f"{where}: part {i} of the content is of type {part.get('type')!r}; only text can be read")
        if not isinstance(part.get("text"), str):
            raise DataError(f"{where}: part {i} of the content: text must be text, not {type_name(part.get('text'))}")
        found.append(part["text"])
        ignored |= {f"{column}[].content[].{k}" for k in part if k not in ("type", "text") and part[k] is not None}
    return "".join(found)


def _learned(rest: dict, where: str, role: str) -> bool:
    """Whether the message may be learned, by the marks that are taken out of `rest`."""
    found = {}
    for key in [key for key in rest if MARK.search(key)]:
        value = rest.pop(key)
        if key not in LEARNED and key not in NOT_LEARNED:
            raise DataError(f"{where}: {key} may say whether the message is learned; write weight, 0 or 1, for it")
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise DataError(f"{where}: {key} must be 0 or 1 (or false or true), not {value!r}")
        found[key] = bool(value) == (key in LEARNED)
    if len(set(found.values())) > 1:
        raise DataError(f"{where}: {', '.join(found)} say different things about whether it is learned")
    if role != "assistant" and True in found.values() and not set(found) <= set(NOT_LEARNED):
        raise DataError(f"{where}: {', '.join(found)}: only messages of the assistant can be learned")
    return role != "assistant" or False not in found.values()


def _unused(rest: dict, where: str, prefix: str, ignored: set[str]) -> None:
    """Name what is left of a row or message; an error where it would have changed what the model reads."""
    for key, value in rest.items():
        if value is None or value == "" or value == [] or value == {}:
            continue
        if key in NOT_TEXT:
            raise DataError(f"{where}{': ' if where else ''}{key}: only text can be read; drop it or leave the row out")
        if key in INSTEAD:
            raise DataError(f"{where}{': ' if where else ''}{key} {INSTEAD[key]}")
        ignored.add(prefix + key)


def unused_columns(row: dict, ignored: set[str]) -> None:
    """Name the columns that are left of a row with a dialogue when all others were taken out."""
    _unused(row, "", "", ignored)


def _calls(value, where: str, ignored: set[str]) -> list[dict]:
    """Tool calls as `[{"type": "function", "function": {"name", "arguments": object}, "id"?}]`."""
    value = _from_json(value, where)
    calls = [value] if isinstance(value, dict) else value
    if not isinstance(calls, list) or not calls:
        raise DataError(f"{where} must be a list of calls, not {type_name(value)}")
    out = []
    for i, call in enumerate(calls, 1):
        at = f"{where}: call {i}"
        if not isinstance(call, dict):
            raise DataError(f"{at} must be an object, not {type_name(call)}")
        rest = {key: item for key, item in call.items() if item is not None}
        if rest.pop("type", "function") != "function":
            raise DataError(f"{at}: type must be function, not {call['type']!r}")
        identity, inner = rest.pop("id", None), rest.pop("function", None)
        function = rest if inner is None else inner
        if not isinstance(function, dict):
            raise DataError(f"{at}: function must be an object with name and arguments, not {type_name(function)}")
        name = text(function.get("name"), f"{at}: name")
        arguments = _from_json(function.get("arguments"), f"{at}: arguments")
        if arguments is None:
            arguments = {}
        if not isinstance(arguments, dict):
            raise DataError(f"{at}: arguments must be an object, not {type_name(arguments)}")
        plain(arguments, f"{at}: arguments")
        made = {"type": "function", "function": {"name": name, "arguments": arguments}}
        out.append(made if identity is None else {"id": text(identity, f"{at}: id"), **made})
        beside = set(function) - {"name", "arguments"} | (set(rest) if inner is not None else set())
        ignored |= {f"tool_calls[].{key}" for key in beside}
    return out


def tools(row: dict) -> dict:
    """`{"tools": […]}` as templates take them, from the column `tools` (a list, or JSON text), which is taken out."""
    value = _from_json(row.pop("tools", None), "tools")
    if value is None or value == "" or value == []:
        return {}
    if not isinstance(value, list):
        raise DataError(f"tools must be a list of tools (or its JSON text), not {type_name(value)}")
    out = []
    for i, tool in enumerate(value, 1):
        if not isinstance(tool, dict):
            raise DataError(f"tools: tool {i} must be an object, not {type_name(tool)}")
        tool = tool if "function" in tool else {"type": "function", "function": tool}
        function = tool["function"]
        if not isinstance(function, dict):
            raise DataError(f"tools: tool {i}: function must be an object, not {type_name(function)}")
        text(function.get("name"), f"tools: tool {i}: name")
        plain(tool, f"tools: tool {i}")
        out.append(tool)
    return {"tools": out}


def _from_json(value, where: str):
    """A value that may be given as its JSON text."""
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return json.loads(value)
    except RecursionError:
        raise DataError(f"{where} is nested too deeply") from None
    except ValueError as error:
        raise DataError(f"{where} is not JSON: {str(error)[:100]}") from None


def plain(value, where: str) -> None:
    """Raise `DataError` for what has no JSON form, or is nested more than `DEPTH` deep."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > DEPTH:
            raise DataError(f"{where} is nested too deeply (more than {DEPTH} levels)")
        below: list = []
        for item in level:
            if isinstance(item, dict):
                if not all(isinstance(key, str) for key in item):
                    raise DataError(f"{where} has a key that is no text")
                below += item.values()
            elif isinstance(item, list):
                below += item
            elif isinstance(item, float) and not math.isfinite(item):
                raise DataError(f"{where} holds {item}, which is no number in JSON")
            elif isinstance(item, int) and not -(2**63) <= item < 2**63:
                raise DataError(f"{where} holds a whole number of more than 64 bits")
            elif item is not None and not isinstance(item, (str, int, float)):
                raise DataError(f"{where} holds a {type_name(item)}, which has no form in JSON")
        level = below


def order(dialogue: list[dict], column: str, ends_with: tuple[str, ...]) -> None:
    """Raise `DataError` where a result of a tool follows nobody's call, or the last message is of another role.

    Whatever else the order, messages go to the chat template as they are: what it refuses or drops is an error there.
    """
    before = ""
    for i, message in enumerate(dialogue, 1):
        if message["role"] == "tool" and before not in ("assistant", "tool"):
            raise DataError(f"{column}: message {i} is the result of a tool, but does not follow the assistant's call")
        before = message["role"]
    if before not in ends_with:
        raise DataError(f"{column} must end with a message of the {' or a '.join(ends_with)}, not of the {before}")


def with_context(row: dict, dialogue: list[dict], column: str) -> list[dict]:
    """The dialogue behind the columns `system` and `history` (pairs of question and answer), which are taken out."""
    system, history = row.pop("system", None), row.pop("history", None)
    before = []
    if system is not None and system != "":
        if not isinstance(system, str):
            raise DataError(f"system must be text, not {type_name(system)}")
        if system.strip():
            before.append({"role": "system", "content": system})
    if before and dialogue[0]["role"] in SYSTEM:
        if dialogue[0]["content"] != system:
            raise DataError(f"system is given twice: as a column, and as the first message of {column}")
        before = []
    if history is not None and not isinstance(history, list):
        raise DataError(
            f"history must be a list of [question, answer], not {type_name(history)}{written_list(history)}"
        )
    turns = []
    for i, pair in enumerate(history or [], 1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError(f"history: item {i} must be a list of two texts, [question, answer]")
        for role, said in zip(("user", "assistant"), pair):
            turns.append({"role": role, "content": text(said, f"history: item {i}: its {role} message")})
    start = 1 if turns and dialogue[0]["role"] in SYSTEM else 0
    return [*before, *dialogue[:start], *turns, *dialogue[start:]]


def prompt(row: dict, ignored: set[str]) -> str | list[dict]:
    """The prompt of a row, text or messages, from `prompt` or `instruction` (+ `input`), `system` and `history`."""
    if row.get("prompt") is None and row.get("instruction") is not None:
        value, extra = text(row.pop("instruction"), "instruction"), row.pop("input", None)
        if extra is not None and not isinstance(extra, str):
            raise DataError(f"input must be text, not {type_name(extra)}")
        value += "\n\n" + extra if extra and extra.strip() else ""
    else:
        value = row.pop("prompt")
    found: str | list[dict]
    if isinstance(value, list):
        found = unmarked(messages(value, "prompt", ignored))
    else:
        found = not_messages(text(value, "prompt"), "prompt")
    if row.get("system") is not None or row.get("history") is not None:
        as_list = [{"role": "user", "content": found}] if isinstance(found, str) else found
        inside = with_context(row, as_list, "prompt")
        found = inside if isinstance(found, list) or len(inside) > 1 else found
    if isinstance(found, list):
        order(found, "prompt", ("user", "tool"))
    return found


def unmarked(dialogue: list[dict]) -> list[dict]:
    """Messages without the marks of what is learned: nothing of a prompt is."""
    return [{k: v for k, v in m.items() if k != "learn"} if "learn" in m else m for m in dialogue]


def not_messages(value: str, column: str) -> str:
    """The text; raises `DataError` where it is a list of messages that became text in a cell."""
    if (
        value[0] in "[{"
        and value.rstrip()[-1] in "]}"
        and re.match(r"""[\[\s]*\{\s*['"](role|from|content|value)['"]\s*:""", value)
    ):
        raise DataError(f"{column} is text that holds a list of messages{written_list(value)}")
    return value


def answer(value, column: str, ignored: set[str]) -> str | list[dict]:
    """An answer: text, or messages of the assistant (with results of tools between) where text alone would lose
    something.
    """
    if isinstance(value, str):
        return not_messages(text(value, column), column)
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        text(value, column)
    return as_answer(messages(value, column, ignored), column)


def as_answer(dialogue: list[dict], column: str) -> str | list[dict]:
    """Messages of an answer as `answer` gives them; raises `DataError` for those of anyone else."""
    roles = [message["role"] for message in dialogue]
    if roles[0] != "assistant" or set(roles) - {"assistant", "tool"}:
        raise DataError(
            f"{column} must be one answer of the assistant (what comes before it belongs into prompt); found "
            f"{', '.join(roles)}"
        )
    if len(dialogue) > 1:
        order([{"role": "user"}, *dialogue], column, ("assistant",))
    return dialogue if len(dialogue) > 1 or len(dialogue[0]) > 2 else dialogue[0]["content"]


def is_whole(value) -> bool:
    """Whether an answer is given as a whole dialogue: messages that begin before it, or Anthropic HH's text."""
    if isinstance(value, str):
        return value.startswith("\n\nHuman:") and "\n\nAssistant:" in value
    first = value[0] if isinstance(value, list) and value else None
    role = (first.get("role") or first.get("from")) if isinstance(first, dict) else None
    return isinstance(role, str) and SPEAKERS.get(role) in (*SYSTEM, "user")


def whole(value, column: str, ignored: set[str]) -> list[dict]:
    """A whole dialogue, given as messages or as Anthropic HH's text."""
    if isinstance(value, list):
        return unmarked(messages(value, column, ignored))
    pieces = HH.split(value)[1:]
    turns = [{"from": speaker.lower(), "value": said} for speaker, said in zip(pieces[::2], pieces[1::2])]
    return messages(turns, column, ignored)


def split_pair(row: dict, chosen: list[dict], rejected: list[dict], ignored: set[str]) -> tuple[list[dict], list]:
    """`(prompt, [chosen answer, rejected answer])` of two whole dialogues: what they share at the beginning is the
    prompt.

    A column `prompt` beside them must be how they begin, or the question that is answered.
    """
    n = next((i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b), min(len(chosen), len(rejected)))
    if chosen == rejected:
        raise DataError("chosen and rejected are the same answer: there is nothing to learn from the pair")
    parts = {"chosen": chosen[n:], "rejected": rejected[n:]}
    for name, part in parts.items():
        if not part:
            raise DataError(f"{name} is the beginning of the other dialogue: both need an answer where they part")
        if {message["role"] for message in part} - {"assistant", "tool"}:
            raise DataError(
                f"chosen and rejected part at message {n + 1}, before the last answer: only that may differ"
            )
    shared = chosen[:n]
    if not shared:
        raise DataError("no column prompt, and chosen and rejected share no beginning")
    given = row.pop("prompt", None)
    if given is not None and not _begins(shared, given, ignored):
        raise DataError("prompt is neither how chosen and rejected begin nor the question that they answer")
    shared = with_context(row, shared, "chosen")
    order(shared, "the beginning of chosen and rejected", ("user", "tool"))
    return shared, [as_answer(part, name) for name, part in parts.items()]


def _begins(shared: list[dict], given, ignored: set[str]) -> bool:
    if isinstance(given, str) and given.startswith("\n\nHuman:"):
        given = whole(given.removesuffix("\n\nAssistant:").removesuffix("\n\nAssistant: "), "prompt", ignored)
    if isinstance(given, list):
        given = unmarked(messages(given, "prompt", ignored))
        return shared[: len(given)] == given or [m for m in shared if m["role"] not in SYSTEM][: len(given)] == given
    asked = [m["content"].strip() for m in shared if m["role"] == "user"]
    return text(given, "prompt").strip() in (asked[:1] + asked[-1:])
