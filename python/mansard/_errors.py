"""A status of the C interface -> an exception, with the message of the thread and what to try."""

from __future__ import annotations

from typing import Dict, Type

from ._native import ffi, lib


class MansardError(Exception):
    """What every error here is. `help` says what to try, where something is known."""

    def __init__(self, message: str, help: str = "") -> None:
        super().__init__(message)
        self.help = help


class UsageError(MansardError, ValueError):
    """A call that makes no sense: an option out of range, an empty or too long prompt, a model that was closed."""


class InputError(MansardError, ValueError):
    """Outside bytes that are damaged or inconsistent: an artifact, a tokenizer."""


class UnsupportedError(MansardError):
    """Well-formed, but nothing for this version or this machine."""


class SystemRefused(MansardError, OSError):
    """The operating system refused: a missing file, no memory."""

    def __init__(self, message: str, help: str = "") -> None:
        MansardError.__init__(self, message, help)


class BusyError(MansardError):
    """Too many requests wait; try again after the time that the message says."""


class ClosedError(MansardError):
    """The model takes no more requests."""


class InternalError(MansardError):
    """A broken invariant of Mansard itself; please report it."""


KINDS: Dict[int, Type[MansardError]] = {
    lib.MANSARD_USAGE: UsageError,
    lib.MANSARD_INPUT: InputError,
    lib.MANSARD_UNSUPPORTED: UnsupportedError,
    lib.MANSARD_IO: SystemRefused,
    lib.MANSARD_BUSY: BusyError,
    lib.MANSARD_CLOSED: ClosedError,
}


def check(status: int) -> None:
    """Raises what a status stands for."""
    if status != lib.MANSARD_OK:
        message, help = (ffi.string(text()).decode() for text in (lib.mansard_error, lib.mansard_help))
        raise KINDS.get(status, InternalError)(message, help)
