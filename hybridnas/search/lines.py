"""Messages between a process and its child: one JSON object a line, on the child's standard input and output."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import IO, Any


def send(stream: IO[str], message: Mapping[str, Any]) -> bool:
    """Write a message; False where the other end is closed."""
    try:
        stream.write(json.dumps(message) + "\n")
        stream.flush()
    except (OSError, ValueError):  # a broken pipe, or a stream that was closed
        return False
    return True


def received(stream: IO[str]) -> Iterator[dict[str, Any]]:
    """Yield the messages of a stream until its end; what libraries print in between is left out."""
    for line in stream:
        try:
            message = json.loads(line)
        except ValueError:
            continue
        if isinstance(message, dict):
            yield message
