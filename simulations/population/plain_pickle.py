"""Pickles of plain values: numbers, texts, lists, tuples and dictionaries, and nothing else.

A pickle is a program, and can name any function to call. Here it is first read as a list of
opcodes, without running any; one that is not in the allow-list ends the reading. Those that
are left can only build plain values. The memo may only grow one by one, so that a number in
the file cannot ask for memory the file has no use for.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from typing import Any, Final, NoReturn

_NUMBERS: Final = "NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT"
_TEXTS: Final = "STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE BINUNICODE8 SHORT_BINUNICODE"
_CONTAINERS: Final = (
    "EMPTY_DICT DICT SETITEM SETITEMS EMPTY_LIST LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 "
    "TUPLE2 TUPLE3"
)
_STORES: Final = frozenset({"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"})
_STACK: Final = "PROTO FRAME STOP MARK POP POP_MARK DUP GET BINGET LONG_BINGET"
_ALLOWED: Final = _STORES.union(*(s.split() for s in (_NUMBERS, _TEXTS, _CONTAINERS, _STACK)))


def read_plain_pickle(data: bytes) -> Any:
    """Return the value in a pickle; raise ValueError for any other opcode, and for no pickle."""
    stored = 0
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name not in _ALLOWED:
                raise ValueError(f"a pickle with {opcode.name}, which plain values do not need")
            if opcode.name in _STORES:
                if isinstance(argument, int) and not 0 <= argument <= stored:
                    raise ValueError(f"a pickle with memo {argument} after {stored}")
                stored += 1
        return _Plain(io.BytesIO(data)).load()
    except (pickle.UnpicklingError, EOFError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"no pickle of plain values: {error}") from None


class _Plain(pickle.Unpickler):
    """Finds no class and no function, whatever is asked of it."""

    def find_class(self, module_name: str, global_name: str, /) -> NoReturn:
        raise pickle.UnpicklingError(f"it names {module_name}.{global_name}")
