"""Whether a request has come to its end, asked before anybody reads it: so that no thread ever waits for a client.

    head ──blank line──► no body ──────────────► whole
      │                  Content-Length, chunked ──all there──► whole
      └─ too long ─► refused                     └─ more than is taken ─► cut or refused

It decides when reading begins and nothing else. What the request means, and whether it is one, is for the server's parser
to say, so anything odd counts as whole: it is refused there at once and not waited for.
"""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import Final

from app.web.arguments import LARGEST_BODY

__all__ = ["LARGEST_HEAD", "Arrival"]

LARGEST_HEAD: Final = 65_536  # bytes; eight fields of the largest size gunicorn takes
_LARGEST_LINE: Final = 8192  # bytes of a request line or of a chunk's size line, as gunicorn has them
_LARGEST_CODED: Final = (
    2 * LARGEST_BODY
)  # bytes of a chunked body; more is not a body cut into chunks but chunks alone
_CRLF: Final = b"\r\n"
_END: Final = b"\r\n\r\n"
_FRAMING: Final = re.compile(
    rb"\r\n(content-length|transfer-encoding|expect):[ \t]*([^\r\n]*)", re.IGNORECASE
)
_LENGTH: Final = re.compile(rb"[0-9]{1,15}")
_CHUNK_SIZE: Final = re.compile(rb"[0-9A-Fa-f]{1,15}")


class Arrival:
    """The bytes of one request as they come, and of what the client may have sent after it.

    `refusal` is the status to answer with when it is not worth a thread. `cut` says that more of it is coming than will be
    read, so that the connection ends with the answer. `expects` says that the client waits to be asked for the body (RFC
    9110, 10.1.1).
    """

    __slots__ = ("_body", "_chunk", "_end", "_need", "_seen", "cut", "expects", "raw", "refusal")

    def __init__(self) -> None:
        self.raw = bytearray()
        self.refusal: HTTPStatus | None = None
        self.cut = False
        self.expects = False
        self._seen = 0  # up to where there is no end of the head
        self._end = 0  # where the head ends, as soon as it is known
        self._need = 0  # where the request ends, if its head says so
        self._chunk: int | None = None  # where the next chunk begins, if it comes in chunks
        self._body = 0  # bytes in the chunks before that

    def add(self, data: bytes) -> bool:
        """Take what has come; true as soon as there is nothing more to wait for."""
        before = len(self.raw)
        self.raw += data
        if not self._end:
            at = self.raw.find(_END, self._seen)
            if at < 0:
                self._seen = max(0, len(self.raw) - len(_END) + 1)
                return self._is_hopeless(before)
            self._read_head(at)
        if self.refusal is not None or self.cut:
            return True
        return len(self.raw) >= self._need if self._chunk is None else self._has_chunks(self._chunk)

    def _is_hopeless(self, before: int) -> bool:
        """Whether the head is none, whatever may follow: the parser takes no line that ends in a bare LF."""
        start = before - 1 if before and self.raw[before - 1] == _CRLF[0] else before
        if self.raw.count(b"\n", start) != self.raw.count(_CRLF, start):
            return True
        return self._is_too_long(len(self.raw))

    def _is_too_long(self, length: int) -> bool:
        if length <= LARGEST_HEAD:
            return False
        in_line = self.raw.find(_CRLF, len(_CRLF), _LARGEST_LINE) < 0
        self.refusal = (
            HTTPStatus.REQUEST_URI_TOO_LONG if in_line else HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
        )
        return True

    def _read_head(self, at: int) -> None:
        self._need = self._end = at + len(_END)
        if self._is_too_long(at):
            return
        fields: dict[bytes, list[bytes]] = {}
        for name, value in _FRAMING.findall(self.raw, 0, at + len(_CRLF)):
            fields.setdefault(name.lower(), []).append(value.strip(b" \t"))
        if not fields:
            return
        expected = [value.lower() for value in fields.get(b"expect", ())]
        if any(value != b"100-continue" for value in expected):
            return
        self._read_framing(fields.get(b"content-length", []), fields.get(b"transfer-encoding", []))
        old = self.raw[: self.raw.find(_CRLF, len(_CRLF))].endswith(b"HTTP/1.0")
        self.expects = bool(expected) and not old and not self.cut

    def _read_framing(self, lengths: list[bytes], codings: list[bytes]) -> None:
        if len(lengths) + bool(codings) != 1:
            return  # none, or two that disagree
        if codings:
            if codings[-1].lower().rpartition(b",")[2].strip(b" \t") == b"chunked":
                self._chunk = self._end
        elif _LENGTH.fullmatch(lengths[0]):
            length = int(lengths[0])
            self.cut = length > LARGEST_BODY
            self._need += 0 if self.cut else length
        elif lengths[0].isdigit():
            self.cut = True

    def _has_chunks(self, at: int) -> bool:
        """Go from chunk to chunk as far as they have come (RFC 9112, 7.1)."""
        while (line := self.raw.find(_CRLF, at)) >= 0:
            size = _CHUNK_SIZE.fullmatch(bytes(self.raw[at:line]).partition(b";")[0].rstrip(b" \t"))
            if size is None:
                return True
            length = int(size[0], 16)
            if length == 0:
                return self._has_trailer(line + len(_CRLF))
            if self._body + length > LARGEST_BODY:
                self.refusal = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
                return True
            after = line + len(_CRLF) + length + len(_CRLF)
            if len(self.raw) < after:
                return self._has_too_much()
            if self.raw[after - len(_CRLF) : after] != _CRLF:
                return True
            self._body += length
            self._chunk = at = after
        return len(self.raw) - at > _LARGEST_LINE or self._has_too_much()

    def _has_trailer(self, at: int) -> bool:
        if self.raw.startswith(_CRLF, at) or self.raw.find(_END, at) >= 0:
            return True
        return self._has_too_much()

    def _has_too_much(self) -> bool:
        if len(self.raw) - self._end <= _LARGEST_CODED:
            return False
        self.refusal = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
        return True
