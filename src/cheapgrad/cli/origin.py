"""Where a record comes from: what stands beside it in a file, so that a report can say how to do it again."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any


def describe_origin(words: Sequence[object]) -> dict[str, Any]:
    """Return the command and the environment as entries of a record's file.

    Args:
        words: of the command that does the same again, without ``cheapgrad`` and without where files go; None is left
            out.
    """
    from cheapgrad.environment import describe_environment

    command = shlex.join(["cheapgrad", *(str(word) for word in words if word is not None)])
    return {"command": command, "environment": describe_environment()}
