"""Python functions that a recipe names as `package.module:function`: reward functions, labellers, judges."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import reprlib
import sys
from collections.abc import Callable, Iterable

from pipelines.errors import SetupError, meant

NAME = re.compile(r"(?!stage:)[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")  # stage:NAME is a stage of the recipe


def is_function(name: str) -> bool:
    """Whether `name` is written as `package.module:function` (and is no `stage:NAME`)."""
    return not name.startswith("stage:") and NAME.fullmatch(name) is not None


def load(name: str) -> Callable:
    """The function `package.module:function`; modules in the current folder are found, too. Raises `SetupError`."""
    if not is_function(name):
        raise SetupError("is written package.module:function")
    module_name, _, function_name = name.partition(":")
    if os.getcwd() not in sys.path:  # as with `python -m`: the installed command does not look there by itself
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # whatever the user's module raises when it is imported
        missing = isinstance(error, ModuleNotFoundError) and module_name.startswith(error.name or " ")
        why = "there is no such module" if missing else f"importing it fails: {type(error).__name__}: {error}"
        raise SetupError(
            f"{module_name}: {why} (looked in {os.getcwd()} and in what is installed; paths are set with PYTHONPATH)"
        ) from error
    function = getattr(module, function_name, None)
    if function is None:
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise SetupError(f"{module_name} has no {function_name}{meant(function_name, names)}")
    if not callable(function):
        raise SetupError(f"{function_name} in {module_name} is no function but {type(function).__name__}")
    return function


def number(value) -> float:
    """What a user's function gave, as a number. Raises `ValueError` for what is none: text, None, a list, 10**400."""
    if not isinstance(value, (str, bytes)):
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: a tensor of several
            pass
    raise ValueError(f"{reprlib.repr(value)} is no number")


def problem(name: str, *arguments: str, columns: Iterable[str] = (), more: bool = False) -> str | None:
    """Why the function cannot be called with these arguments, or None.

    Args:
        arguments: names of the positional ones.
        columns: names of those that are given by name.
        more: whether further ones may be given by name, which nobody knows yet.
    """
    try:
        function = load(name)
        signature = inspect.signature(function)
    except SetupError as error:
        return str(error)
    except ValueError:  # written in C: nothing is known about it
        return None
    try:
        bind = signature.bind_partial if more else signature.bind
        bind(*arguments, **dict.fromkeys(columns))
    except TypeError as error:
        given = ", ".join([*arguments, *(f"{key}=…" for key in columns)])
        return f"cannot be called with ({given}): {error}. It is {function.__name__}{signature}"
    return None
