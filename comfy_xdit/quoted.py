"""What others say (an exception's text, a line of a log), as our sentences quote it: on one line, without paths."""

from __future__ import annotations

import re

_IN_QUOTES = re.compile(r"""(["'])((?:file:|~[\w.-]*)?/[^"'\n]+)\1""")
"""A path may have any letter; between quotes its end is known."""

_BARE = re.compile(r"""(?<![\w./])(?:file:/+|(?:~[\w.-]*)?(?:(?<!:)/+|/(?!/)))[^\s"'`,;()\[\]{}<>|]+""")
"""Up to what ends a word. Not the slash of and/or, of a relative path, or those of an address in the web."""


def quoted(said: object) -> str:
    """`str(said)` on one line; of each path of the machine its last name is left.

    What users read goes into bug reports and screenshots, and a path tells who they are. The logs have the whole.
    """
    text = _IN_QUOTES.sub(lambda found: found[1] + _last_name(found[2]) + found[1], str(said))
    return " ".join(_BARE.sub(lambda found: _last_name(found[0]), text).split())


def _last_name(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]
