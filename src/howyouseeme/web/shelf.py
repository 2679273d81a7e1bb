"""What has been shown lately, so that it can be asked about and saved; in memory, never in a file."""

from __future__ import annotations

import hashlib
import secrets
import threading
from collections import OrderedDict
from typing import Any

__all__ = ["Shelf"]


class Shelf:
    """Keeps the last things put on it, up to so many bytes, each under a key that nobody can guess.

    >>> shelf = Shelf(512 * 2**20)
    >>> key = shelf.put(shelf.key("cat.jpg", 285), scene, scene.size)
    >>> shelf.get(key)

    The same words have the same key, as long as the shelf is there. What isn't asked for goes first; the
    thing put there last is kept, however large it is.
    """

    def __init__(self, most: int) -> None:
        self._most, self._held = most, 0
        self._secret = secrets.token_bytes(32)
        self._kept: OrderedDict[str, tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()

    def key(self, *words: object) -> str:
        """The key of what these words tell."""
        text = "\0".join(map(repr, words)).encode()
        return hashlib.blake2b(text, key=self._secret, digest_size=16).hexdigest()

    def put(self, key: str, thing: Any, size: int) -> str:
        """Keep a thing of about so many bytes."""
        with self._lock:
            self._held += size - self._kept.pop(key, (None, 0))[1]
            self._kept[key] = thing, size
            while self._held > self._most and len(self._kept) > 1:
                self._held -= self._kept.popitem(last=False)[1][1]
        return key

    def get(self, key: str) -> Any | None:
        """What lies there; None where nothing does any more."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key, (None, 0))[0]
