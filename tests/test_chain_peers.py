# SPDX-License-Identifier: Apache-2.0
"""
Checkpoints under other people's code: pymerkle's trees, libsodium, OpenSSL.

Published vectors of RFC 6962, of form "3" and of signed notes are in `test_chain`.
"""

from __future__ import annotations

import hashlib
import random
import shutil
import subprocess
from base64 import b64decode
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nacl.exceptions import BadSignatureError
from nacl.signing import VerifyKey
from pymerkle import InmemoryTree

from fasten import chain
from tests.ledger import CLASSES, Ledger
from tests.outside import unavailable

DASH = "\N{EM DASH} "


@given(st.lists(st.binary(min_size=32, max_size=32), max_size=70))
def test_roots_are_those_of_pymerkle(digests):
    """
    Of every size on the way, and after the frontier was text in between.
    """
    tree, frontier = InmemoryTree(algorithm="sha256"), chain.Frontier()
    roots, expected = [], []
    for digest in digests:
        tree.append_entry(digest)
        frontier.push(digest)
        frontier = chain.Frontier.read(str(frontier), frontier.size)
        roots.append(frontier.root())
        expected.append(tree.get_root())

    assert expected == roots


def test_a_large_tree():
    """
    With each digest of thousands different.
    """
    tree, frontier = InmemoryTree(algorithm="sha256"), chain.Frontier()
    dice = random.Random(6962)
    for _ in range(5_000):
        digest = dice.randbytes(32)
        tree.append_entry(digest)
        frontier.push(digest)

    assert tree.get_root() == frontier.root()


def opened(note: str, vkey: str) -> bytes:
    """
    Verify a note as its specification says, with libsodium; return its text.
    """
    name, key_hash, encoded = vkey.split("+", 2)
    key = b64decode(encoded)
    number = hashlib.sha256(name.encode() + b"\n" + key).digest()[:4]
    assert (1, key_hash) == (key[0], number.hex())

    text, _, signatures = note.rpartition("\n\n")
    message = f"{text}\n".encode()
    for line in signatures.splitlines():
        signer, _, signature = line.removeprefix(DASH).partition(" ")
        raw = b64decode(signature)
        if (signer, raw[:4]) == (name, number):
            return VerifyKey(key[1:]).verify(message, raw[4:])
    raise BadSignatureError("no signature of this key")


def test_notes_are_opened_by_libsodium():
    """
    Size, root and number stand in a text that it finds signed.
    """
    log = Ledger(3)
    for number in range(9):
        log.emit("n1/ü", CLASSES[number % 2])
    texts = [opened(note, log.signer.vkey) for note in log.checkpoint()]
    lines = [text.decode().splitlines() for text in texts]
    tree = InmemoryTree(algorithm="sha256")
    for row in log.of_chain(("shop", "n1/ü", "short")):
        tree.append_entry(bytes.fromhex(row[30]))

    assert ["shop/n1%2F%C3%BC/short", "shop/n1%2F%C3%BC/medium"] == [
        x[0] for x in lines
    ]
    assert ["5", "4"] == [line[1] for line in lines]
    assert tree.get_root() == b64decode(lines[0][2])
    assert ["monotonic_seq 9", "monotonic_seq 8"] == [line[3] for line in lines]


def test_an_edited_note_is_refused_by_libsodium():
    """
    As it is by us.
    """
    log = Ledger(3)
    log.emit("n1", "short")
    (note,) = log.checkpoint()
    edited = note.replace("\n1\n", "\n2\n", 1)
    with pytest.raises(BadSignatureError):
        opened(edited, log.signer.vkey)

    assert "bad" == chain.Note.parse(edited).verdict(log.verifiers)


def test_a_pem_of_openssl_signs(tmp_path: Path):
    """
    `openssl genpkey` makes a key for FASTEN_SIGNING_KEY, and checks what it signed.
    """
    openssl = shutil.which("openssl")
    if openssl is None:
        unavailable("openssl is not installed")
    pem, public = tmp_path / "key.pem", tmp_path / "key.pub"
    for words in (
        ("genpkey", "-algorithm", "ed25519", "-out", pem),
        ("pkey", "-in", pem, "-pubout", "-out", public),
    ):
        subprocess.run([openssl, *words], check=True, capture_output=True)
    signer = chain.ed25519_signer("shop", pem.read_text())
    said = chain.Checkpoint(key=("shop", "n1", "short"), size=7, root=bytes(32), seq=9)
    ((_, number, signature),) = chain.Note.parse(said.sign([signer])).signatures
    (tmp_path / "text").write_text(said.body())
    (tmp_path / "signature").write_bytes(signature)
    done = subprocess.run(
        [
            *(openssl, "pkeyutl", "-verify", "-pubin", "-inkey", public, "-rawin"),
            *("-in", tmp_path / "text", "-sigfile", tmp_path / "signature"),
        ],
        check=False,
        capture_output=True,
        text=True,
    )

    assert number == signer.key_hash
    assert "Signature Verified Successfully" in done.stdout
