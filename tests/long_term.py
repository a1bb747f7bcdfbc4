"""The long-term tier as others see it, who read payloads by the references they were given: a folder, or a bucket."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote, unquote, urlsplit

ANSWER_SECONDS = 60.0
"""Longest wait for an answer of the bucket's server."""


class Payloads(Protocol):
    """What lies in a long-term tier."""

    prefix: str
    """What references into it begin with."""

    def read(self, uri: str) -> bytes:
        """Return the payload that a reference points to; raises where there is none."""
        ...

    def size(self, uri: str) -> int | None:
        """Return its size in bytes, None where there is none."""
        ...

    def sizes(self) -> list[int]:
        """Return the sizes of all that lie there, sorted."""
        ...


class Folder:
    """A tier in a folder, whose references are ``file://``."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.prefix = root.as_uri() + "/"

    def read(self, uri: str) -> bytes:
        return self._path(uri).read_bytes()

    def size(self, uri: str) -> int | None:
        path = self._path(uri)
        return path.stat().st_size if path.exists() else None

    def sizes(self) -> list[int]:
        return sorted(path.stat().st_size for path in self._root.rglob("*.payload"))

    @staticmethod
    def _path(uri: str) -> Path:
        parts = urlsplit(uri)
        assert (parts.scheme, parts.netloc, parts.query, parts.fragment) == ("file", "", "", "")
        return Path(unquote(parts.path))


class Bucket:
    """A tier in a bucket, whose references are ``gs://``, with names as they are."""

    def __init__(self, endpoint: str, bucket: str) -> None:
        self._objects = f"{endpoint}/storage/v1/b/{bucket}/o"
        self.prefix = f"gs://{bucket}/"

    def read(self, uri: str) -> bytes:
        return self._get(f"/{self._name(uri)}?alt=media")

    def size(self, uri: str) -> int | None:
        try:
            return int(json.loads(self._get(f"/{self._name(uri)}"))["size"])
        except urllib.error.HTTPError as error:
            with error:
                if error.code != 404:
                    raise
            return None

    def sizes(self) -> list[int]:
        return sorted(int(found["size"]) for found in json.loads(self._get("")).get("items", ()))

    def _name(self, uri: str) -> str:
        assert uri.startswith(self.prefix)
        return quote(uri.removeprefix(self.prefix), safe="")

    def _get(self, what: str) -> bytes:
        with urllib.request.urlopen(self._objects + what, timeout=ANSWER_SECONDS) as answer:
            content: bytes = answer.read()
            return content


def payloads_of(section: Mapping[str, Any]) -> Payloads:
    """Return the tier that a configuration describes."""
    if section["type"] == "gcs":
        return Bucket(section["endpoint"], section["bucket"])
    return Folder(Path(section["path"]))
