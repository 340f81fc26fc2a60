# SPDX-License-Identifier: Apache-2.0
"""
`keygen` and `checkpoint`: what a service signs with, and what its chains are now.
"""

from __future__ import annotations

import os
from base64 import b64encode
from pathlib import Path
from typing import Any

import click

from fasten.chain import ed25519_signer
from fasten.cli.command import Command, Failure, WrongUsage, read_settings, say, write
from fasten.cli.hands import dsn_option, opened
from fasten.cli.text import counted
from fasten.errors import MissingExtra

__all__ = ["checkpoint", "keygen"]


@click.command(
    cls=Command, epilog="Example: fasten checkpoint -o /mnt/worm/monday.note"
)
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the notes to this file, not to stdout.",
)
@dsn_option
def checkpoint(*, output: Path | None, dsn: str | None) -> None:
    """
    Sign each chain of this service as it is now, and print the notes.

    Keep them where nobody who can write to the store can write: `fasten verify
    --checkpoint FILE --key VKEY` then finds a tail that was cut, or a whole table that
    was sealed anew.
    """
    with opened(dsn) as custody:
        notes = custody.checkpoint()
    if not notes:
        raise Failure("this service has no rows in the store, so nothing to sign")
    text = "\n".join(notes)
    if output is None:
        write([text.removesuffix("\n")])
    else:
        _replace(output, text)
        say(f"{counted(len(notes), 'checkpoint')} written to {output}")


def _replace(path: Path, text: str) -> None:
    """
    Write a file whole, or leave what was there.
    """
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(path)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise WrongUsage(f"{path} cannot be written: {error.strerror}") from None


@click.command(
    cls=Command,
    epilog="Example: fasten keygen -o /etc/shop/fasten.pem  # prints the public key",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the secret key to this file (PEM, mode 0600), and print the public one "
    "only.",
)
def keygen(*, output: Path | None) -> None:
    """
    Make an Ed25519 key for FASTEN_SIGNING_KEY; print it and its public half.

    The public half (vkey) is what `fasten verify --key` takes; it bears the name of
    the service, FASTEN_SERVICE_ID.
    """
    settings = read_settings()
    if not os.environ.get("FASTEN_SERVICE_ID"):
        raise WrongUsage("FASTEN_SERVICE_ID is not set: a key bears a service's name")
    seed = os.urandom(32)
    vkey = ed25519_signer(settings.service_id, b64encode(seed).decode()).vkey
    if output is None:
        write([f"FASTEN_SIGNING_KEY={b64encode(seed).decode()}", f"# vkey: {vkey}"])
        return
    _store_key(output, _pem(seed))
    say(f"FASTEN_SIGNING_KEY={output}")
    write([vkey])


def _pem(seed: bytes) -> bytes:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise MissingExtra(
            "keys need the package cryptography; pip install 'fasten[seal]'"
        ) from None
    key: Any = ed25519.Ed25519PrivateKey.from_private_bytes(seed)
    pem: bytes = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return pem


def _store_key(path: Path, pem: bytes) -> None:
    try:
        # Never over a key that is there: what it signed could not be checked any more.
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise Failure(f"{path} cannot be made: {error.strerror}") from None
    with os.fdopen(fd, "wb") as file:
        file.write(pem)
