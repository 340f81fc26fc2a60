# SPDX-License-Identifier: Apache-2.0
"""
Verification as callers ask for it: of a store, an NDJSON file, or rows at hand.

Finds the rows, checkpoints and keys that are meant. What they prove is told by
`evidence`; a store is read by `repository.snapshot`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, Final

from fasten.chain import Verifier, ed25519_signer, ed25519_verifier, split_notes
from fasten.engine import default
from fasten.errors import AuditStoreError
from fasten.evidence import Report, verify_ndjson
from fasten.rows import AuditRow
from fasten.settings import Dsn, Settings

__all__ = [
    "KEY_SHAPE",
    "bundled",
    "read_keys",
    "read_notes",
    "trusted",
    "verify",
    "verify_file",
    "verify_store",
]

KEY_SHAPE: Final = "key"
"""The shape of the line of an export that names the key which signed it."""

Text = str | Path
Progress = Callable[[int, int], None]
Given = Text | Iterable[Text] | None
"""One or several texts, or paths of files that hold them."""


def verify(
    rows: Text | Iterable[AuditRow | dict[str, Any] | str] | None = None,
    checkpoint: Given = None,
    key: Given = None,
    *,
    require_anchor: bool = False,
) -> Report:
    """
    Verify the store of `init()`, or *rows*: an export's path, or rows at hand.

    *checkpoint* and *key* are what `fasten checkpoint` and `fasten keygen` printed,
    or files of it; several may be given. Without *key* the public half of
    FASTEN_SIGNING_KEY counts.

    Raises:
        NotInitialized: no rows were given, and `init()` was not called.
        AuditStoreError: the store cannot be read now.
        ValueError: a checkpoint or key is none.
        MissingExtra: keys are there, and `cryptography` is not installed.
    """
    given = [note for text in _each(checkpoint) for note in read_notes(text)]
    keys = [found for text in _each(key) for found in read_keys(text)]
    if rows is None:
        settings = default().settings
        return verify_store(
            _dsn_of(settings),
            given=given,
            verifiers=keys or trusted(settings),
            require_anchor=require_anchor,
        )
    if isinstance(rows, str | Path):
        return verify_file(
            Path(rows), given=given, verifiers=keys, require_anchor=require_anchor
        )
    return verify_ndjson(
        map(_line, rows), given=given, verifiers=keys, require_anchor=require_anchor
    )


def _each(given: Given) -> list[Text]:
    if given is None:
        return []
    return [given] if isinstance(given, str | Path) else list(given)


def _dsn_of(settings: Settings) -> Dsn:
    if settings.audit_dsn is None:
        raise AuditStoreError(
            "there is no audit store to verify; set FASTEN_AUDIT_DSN, or give rows"
        )
    return settings.audit_dsn


def _line(row: AuditRow | dict[str, Any] | str) -> str:
    if isinstance(row, str):
        return row
    return json.dumps(row.to_dict() if isinstance(row, AuditRow) else row)


# --- stores and files -----------------------------------------------------------------


def verify_store(
    dsn: Dsn,
    *,
    given: Iterable[str] = (),
    verifiers: Iterable[Verifier] = (),
    require_anchor: bool = False,
    progress: Progress = lambda _done, _total: None,
) -> Report:
    """
    Verify the store at *dsn*; *progress* is told rows read, and about how many.

    Raises:
        AuditStoreError: it cannot be read now.
    """
    from fasten.repository import Database
    from fasten.repository.snapshot import verify as verify_snapshot

    try:
        return verify_snapshot(
            dsn,
            given=given,
            verifiers=verifiers,
            require_anchor=require_anchor,
            progress=progress,
        )
    except FileNotFoundError as error:
        raise AuditStoreError(f"{error}: nothing was recorded so far") from None
    except Exception as error:  # the driver's: told without its DSN
        problem = Database(dsn).problem(error)
        raise AuditStoreError(f"the store cannot be read: {problem.message}") from None


def verify_file(
    path: Path,
    *,
    given: Iterable[str] = (),
    verifiers: Iterable[Verifier] = (),
    require_anchor: bool = False,
    progress: Progress = lambda _done, _total: None,
) -> Report:
    """
    Verify an NDJSON file; checkpoints that stand in it count as given.

    Keys that stand in it do not: whoever forged the file could have put them there.
    *progress* is told characters read, and bytes there are.

    Raises:
        OSError: the file cannot be read.
    """
    notes = [*given, *(text for shape, text in bundled(path) if shape != KEY_SHAPE)]
    with _opened(path) as lines:
        return verify_ndjson(
            _told(lines, path.stat().st_size, progress),
            given=notes,
            verifiers=verifiers,
            require_anchor=require_anchor,
        )


def _told(lines: Iterable[str], total: int, progress: Progress) -> Iterator[str]:
    done = 0
    for number, line in enumerate(lines, 1):
        yield line
        done += len(line)
        if number % _STEP == 0:
            progress(done, total)


_STEP: Final = 500


def bundled(path: Path) -> Iterator[tuple[str, str]]:
    """
    Yield what an export holds beside rows: (shape, note or vkey).

    Raises:
        OSError: the file cannot be read.
    """
    with _opened(path) as lines:
        for line in lines:
            # Rows are many and long: most are told by their beginning.
            if line.startswith('{"shape":"audit"'):
                continue
            yield from (("checkpoint", note) for note in _notes_in(line))
            if f'"{KEY_SHAPE}"' in line[:40]:
                yield from ((KEY_SHAPE, key) for key in _keys_in(line))


def _opened(path: Path) -> IO[str]:
    # What is no UTF-8 is a finding, not an error.
    return path.open(encoding="utf-8", errors="surrogateescape", newline="\n")


def _notes_in(line: str) -> list[str]:
    return split_notes(line) if line.startswith("{") else []


def _keys_in(line: str) -> Iterator[str]:
    try:
        read = json.loads(line)
    except (ValueError, RecursionError):
        return
    if read.get("shape") == KEY_SHAPE and isinstance(read.get("vkey"), str):
        yield read["vkey"]


# --- checkpoints and keys -------------------------------------------------------------


def read_notes(given: Text) -> list[str]:
    """
    Return the checkpoints in a text, or in the file that it names.

    Raises:
        OSError: the file cannot be read.
        ValueError: there is none in it.
    """
    text = given if _is_note(given) else Path(given).read_text(encoding="utf-8")
    notes = split_notes(str(text))
    if not notes:
        raise ValueError(
            f"{given!s:.80} holds no checkpoint; give what `fasten checkpoint` printed"
        )
    return notes


def _is_note(given: Text) -> bool:
    return isinstance(given, str) and ("\n" in given or given.startswith("{"))


def read_keys(given: Text) -> list[Verifier]:
    """
    Return the public keys in a text, or in the file that it names.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no key.
        MissingExtra: `cryptography` is not installed.
    """
    found = _VKEY.findall(str(given))
    if not found:
        path = Path(given)
        if not path.is_file():
            return [ed25519_verifier(str(given))]  # which says what is wrong with it
        found = _VKEY.findall(path.read_text(encoding="utf-8"))
        if not found:
            raise ValueError(
                f"{path} holds no public key; give what `fasten keygen` printed"
            )
    return [ed25519_verifier(vkey) for vkey in found]


_VKEY: Final = re.compile(r"(?<!\S)[^\s+]+\+[0-9a-f]{8}\+[A-Za-z0-9+/]+=*(?!\S)")


def trusted(settings: Settings) -> list[Verifier]:
    """
    Return the public halves of FASTEN_SIGNING_KEY.

    Raises:
        MissingExtra: `cryptography` is not installed.
    """
    return [
        ed25519_verifier(ed25519_signer(settings.service_id, key.reveal()).vkey)
        for key in settings.signing_key
    ]
