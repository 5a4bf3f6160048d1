"""Texts as users give them: files of any encoding, and JSON."""

import codecs
import json
import re
from pathlib import Path
from typing import Any

WORD = r"[^\s\ud800-\udc7f\udd00-\udfff]{0,20}"  # some of a word, with bytes that are not UTF-8


def read_text(path: Path, what: str) -> str:
    """The text of a file in UTF-8, or in UTF-16 with a byte order mark, which spreadsheets write.

    A byte that is not UTF-8 becomes a lone surrogate, U+DC80 … U+DCFF, so that the text that holds it can be told;
    `find_encoding_fault` finds it.

    Args:
        path: the file.
        what: it is, for messages.

    Raises:
        FileNotFoundError, IsADirectoryError: if there is no such file.
        ValueError: if it is UTF-16 that is damaged.
    """
    if path.is_dir():
        raise IsADirectoryError(f"the {what} {str(path)!r} is a folder: name the file")
    if not path.is_file():
        raise FileNotFoundError(f"there is no {what} {str(path)!r}")
    content = path.read_bytes()
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        try:
            return content.decode("utf-16")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"the {what} {str(path)!r} is not the UTF-16 that its first bytes say: {error}"
            ) from error
    return content.decode("utf-8-sig", errors="surrogateescape")


def parse_json(text: str) -> Any:
    """What a JSON text holds.

    Raises:
        ValueError: if it is not JSON, or is nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def find_encoding_fault(text: str) -> str | None:
    """What keeps a text from being written as UTF-8, if anything does: bytes of another encoding, or half of a pair."""
    if escaped := re.search(rf"{WORD}[\udc80-\udcff]{WORD}", text):
        word = escaped[0].encode("utf-8", "surrogateescape").decode("cp1252", "replace")
        return f"is not UTF-8, but perhaps cp1252 or Latin-1, which would make it {word!r}: save the file as UTF-8"
    if lone := re.search(r"[\ud800-\udfff]", text):
        return f"holds half of a surrogate pair, {lone[0]!a}: write the whole character"
    return None
