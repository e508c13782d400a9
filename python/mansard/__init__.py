"""Compiled transformer artifacts: text in, text out; over Mansard's C interface.

    model = mansard.Model("m.mansard")
    model.generate("Once upon a time", max_tokens=50).text()     # all at once
    for piece in model.generate("Once upon a time"): ...         # as it comes
    with model.chat([{"role": "user", "content": "Hi"}]) as answer: ...

A `Model` may be used by any thread: what they ask for runs together. The interpreter is free while it waits.
"""

from ._errors import BusyError, ClosedError, InputError, InternalError, MansardError, SystemRefused, UnsupportedError, UsageError
from ._model import Answer, Facts, Finish, Message, Model, Token, version

__all__ = [
    "Answer",
    "BusyError",
    "ClosedError",
    "Facts",
    "Finish",
    "InputError",
    "InternalError",
    "MansardError",
    "Message",
    "Model",
    "SystemRefused",
    "Token",
    "UnsupportedError",
    "UsageError",
    "version",
]
