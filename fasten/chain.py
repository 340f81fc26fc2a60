# SPDX-License-Identifier: Apache-2.0
"""
How rows become a chain: canonical form, seal, Merkle frontier, records, checkpoints.

Values and functions only: rows, heads, keys and random bytes come in as arguments.
What a sealed table proves is `evidence`'s; where it is stored, `repository`'s.
"""

from __future__ import annotations

import json
import re
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from hashlib import sha256
from typing import Any, Final, Literal, NamedTuple
from urllib.parse import quote as percent_encode
from urllib.parse import unquote as percent_decode

import attrs

from fasten.errors import MissingExtra
from fasten.rows import (
    AUDIT_COLUMNS,
    WIRE_VERSION,
    Pending,
    canonical_json,
    format_timestamp,
    quote,
)

__all__ = [
    "COMMITTED_FIELDS",
    "FORM",
    "GENESIS",
    "HEADER_KEYS",
    "RECORD_CODES",
    "RECORD_DOMAIN",
    "SALT_BYTES",
    "ChainKey",
    "Checkpoint",
    "Cut",
    "Frontier",
    "Head",
    "Memory",
    "Note",
    "Restored",
    "Salt",
    "Signer",
    "Verifier",
    "commitment_of",
    "cut",
    "ed25519_signer",
    "ed25519_verifier",
    "erase",
    "is_frontier",
    "is_hash",
    "restate",
    "seal",
    "split_notes",
]

FORM: Final = "3"
"""The canonical form that `seal` writes; its keys are frozen in conformance/."""

GENESIS: Final = "genesis"
"""The prev_hash of the first row of a chain."""

SALT_BYTES: Final = 16
"""Random bytes that `seal` takes per row."""

RECORD_DOMAIN: Final = "fasten"
"""The domain of fasten's own rows: no other row counts as a record."""

RECORD_CODES: Final = (
    "AUDIT_ROWS_DROPPED",
    "AUDIT_ROW_ERASED",
    "AUDIT_ROW_QUARANTINED",
    "CHAIN_RESTORED",
    "RETENTION_SWEEP_RAN",
)
"""The codes whose rows, in RECORD_DOMAIN, explain what is not there any more."""

COMMITTED_FIELDS: Final = (
    "actor",
    "client",
    "detail",
    "on_behalf_of",
    "reason",
    "target",
)
"""The fields that can be erased: sealed one by one, under the commitment."""

HEADER_KEYS: Final = (
    "action",
    "actor_kind",
    "canonical_form_id",
    "category",
    "code",
    "commitment",
    "domain",
    "id",
    "method",
    "monotonic_seq",
    "origin_id",
    "outcome",
    "prev_hash",
    "request_id",
    "retention_class",
    "service_id",
    "severity",
    "source_node_id",
    "span_id",
    "tenant_id",
    "timestamp",
    "trace_id",
    "wire_version",
)
"""The keys that `hash` covers in form "3", sorted."""

ChainKey = tuple[str, str, str]
"""(service_id, source_node_id, retention_class)."""


@attrs.define(slots=True, kw_only=True)
class Head:
    """
    Where one chain of (service, node, retention class) stands.

    The frontiers are text of `Frontier`. The pruned fields tell what sweeps have cut
    from the front. Counts include the rows that were cut.
    """

    service_id: str
    source_node_id: str
    retention_class: str
    seq: int = 0
    hash: str = GENESIS
    count: int = 0
    frontier: str = ""
    pruned_seq: int = 0
    pruned_hash: str = GENESIS
    pruned_count: int = 0
    pruned_frontier: str = ""
    checkpointed_at: str | None = None

    @property
    def key(self) -> ChainKey:
        """
        Return (service_id, source_node_id, retention_class).
        """
        return (self.service_id, self.source_node_id, self.retention_class)

    @property
    def origin(self) -> str:
        """
        Return the key as one text, each part percent-encoded.
        """
        return "/".join(percent_encode(part, safe="") for part in self.key)

    @property
    def is_empty(self) -> bool:
        """
        Tell whether the chain has no rows any more, or not yet.
        """
        return self.count == self.pruned_count


# --- Merkle tree (RFC 6962, section 2.1) ----------------------------------------


class Frontier:
    """
    The right edge of a Merkle tree: the roots of its full subtrees, largest first.

    A row's leaf is SHA256(0x00 || the 32 bytes of its hash). As text a frontier is
    hex, 64 characters a root: as many roots as *size* has 1 bits.
    """

    __slots__ = ("nodes", "size")

    def __init__(self) -> None:
        self.nodes: list[bytes] = []
        self.size = 0

    @classmethod
    def read(cls, text: str, size: int) -> Frontier:
        """
        Read the text of the frontier of a tree of *size* rows.

        Raises:
            ValueError: *text* is not one; only an edit of a head can do that.
        """
        if not is_frontier(text, size):
            raise ValueError(
                f"the frontier of a chain of {size} rows was edited; run fasten verify"
            )
        frontier = cls()
        frontier.size = size
        raw = bytes.fromhex(text)
        frontier.nodes = [raw[i : i + 32] for i in range(0, len(raw), 32)]
        return frontier

    def push(self, digest: bytes) -> None:
        """
        Append a row by the 32 bytes of its hash.
        """
        node = sha256(b"\x00" + digest).digest()
        size, nodes = self.size, self.nodes
        self.size = size + 1
        # Each trailing 1 bit of the size is a full subtree that finds its sibling.
        while size & 1:
            node = sha256(b"\x01" + nodes.pop() + node).digest()
            size >>= 1
        nodes.append(node)

    def root(self) -> bytes:
        """
        Return the 32 bytes of the tree's root.
        """
        if not self.nodes:
            return sha256(b"").digest()
        root = self.nodes[-1]
        for node in reversed(self.nodes[:-1]):
            root = sha256(b"\x01" + node + root).digest()
        return root

    def __str__(self) -> str:
        return b"".join(self.nodes).hex()


def is_hash(value: object) -> bool:
    """
    Tell whether *value* is 32 bytes in lower-case hex.
    """
    return isinstance(value, str) and _HEX_64.match(value) is not None


def is_frontier(text: object, size: object) -> bool:
    """
    Tell whether *text* can be the frontier of a tree of *size* rows.
    """
    if type(text) is not str or type(size) is not int or size < 0:
        return False
    hex_digits = set("0123456789abcdef")
    return len(text) == 64 * size.bit_count() and hex_digits.issuperset(text)


_HEX_64: Final = re.compile(r"[0-9a-f]{64}\Z")


# --- sealing --------------------------------------------------------------------


def seal(
    rows: Sequence[Pending],
    *,
    service: str,
    node: str,
    first_seq: int,
    heads: MutableMapping[str, Head],
    salts: bytes,
    stored_at: str | None = None,
) -> list[tuple[Any, ...]]:
    """
    Number, salt, commit and link *rows*; return them in the order of AUDIT_COLUMNS.

    *heads*, by retention class, are moved forward in place; a class without one
    gets its first. *salts* is SALT_BYTES random bytes per row. *stored_at* is the
    store's clock; shipped_at is None.

    Raises:
        ValueError: *salts* is too short, a text holds a lone surrogate, or a head
            was edited; the heads have not moved then.
    """
    if len(salts) < SALT_BYTES * len(rows):
        raise ValueError(
            f"{len(salts)} bytes of salt for {len(rows)} rows; "
            f"pass {SALT_BYTES} for each row"
        )
    ends = {name: _End(head) for name, head in heads.items()}
    sealed = _seal_rows(rows, (service, node), first_seq, ends, salts.hex(), stored_at)
    for name, end in ends.items():
        if name not in heads:
            heads[name] = Head(
                service_id=service, source_node_id=node, retention_class=name
            )
        end.store(heads[name])
    return sealed


class _End:
    """
    The moving end of one chain while a batch is sealed.
    """

    __slots__ = ("frontier", "hash", "seq")

    def __init__(self, head: Head | None) -> None:
        self.seq = head.seq if head else 0
        self.hash = head.hash if head else GENESIS
        self.frontier = Frontier.read(head.frontier, head.count) if head else Frontier()

    def store(self, head: Head) -> None:
        """
        Move *head* here.
        """
        head.seq, head.hash = self.seq, self.hash
        head.count, head.frontier = self.frontier.size, str(self.frontier)


# The drainer spends more time here than anywhere else in Python, and two thirds of
# it in sha256. So this one is written out: the header is assembled in the order of
# HEADER_KEYS, and whatever repeats within a batch is quoted once. A checker of a few
# lines in tests/test_chain.py holds it against json and rfc8785.
def _seal_rows(  # noqa: PLR0915
    rows: Sequence[Pending],
    home: tuple[str, str],
    first_seq: int,
    ends: dict[str, _End],
    salts: str,
    stored_at: str | None,
) -> list[tuple[Any, ...]]:
    fixed: dict[tuple[str, ...], tuple[str, str, str, str, str]] = {}
    service, node = home
    second = ""
    at = low = high = 0
    sealed = []
    for seq, row in enumerate(rows, first_seq):
        # fmt: off
        (id_, us, code, action, severity, category, domain, class_, outcome, actor,
         actor_kind, behalf, tenant, client, target, method, reason, request_id,
         trace_id, span_id, detail) = row
        # fmt: on
        salt = salts[at : at + 32]
        at += 32

        keyed = f"{salt}:".encode()
        key = sha256(keyed + b"actor").digest()
        leaf = sha256(key + quote(actor).encode()).hexdigest()
        leaves = f'{{"actor":"{leaf}"'
        if client is not None:
            key = sha256(keyed + b"client").digest()
            leaf = sha256(key + quote(client).encode()).hexdigest()
            leaves = f'{leaves},"client":"{leaf}"'
        key = sha256(keyed + b"detail").digest()
        leaf = sha256(key + detail.encode()).hexdigest()
        leaves = f'{leaves},"detail":"{leaf}"'
        if behalf is not None:
            key = sha256(keyed + b"on_behalf_of").digest()
            leaf = sha256(key + quote(behalf).encode()).hexdigest()
            leaves = f'{leaves},"on_behalf_of":"{leaf}"'
        if reason is not None:
            key = sha256(keyed + b"reason").digest()
            leaf = sha256(key + quote(reason).encode()).hexdigest()
            leaves = f'{leaves},"reason":"{leaf}"'
        key = sha256(keyed + b"target").digest()
        leaf = sha256(key + quote(target).encode()).hexdigest()
        commitment = sha256(f'{leaves},"target":"{leaf}"}}'.encode()).hexdigest()

        # fmt: off
        kind = (action, actor_kind, category, code, domain, method, outcome, class_,
                severity)
        # fmt: on
        try:
            a, b, c, d, e = fixed[kind]
        except KeyError:
            a, b, c, d, e = fixed[kind] = _fixed_runs(kind, home)
        try:
            end = ends[class_]
        except KeyError:
            end = ends[class_] = _End(None)
        if not low <= us < high:
            low = us - us % 1_000_000
            high = low + 1_000_000
            second = format_timestamp(low)[:20]
        timestamp = f"{second}{us - low:06d}Z"
        quoted_id = quote(id_)
        prev_hash = end.hash
        header = (
            f'{a}{commitment}{b}{quoted_id}{c}{seq},"origin_id":{quoted_id}{d}'
            f'{prev_hash}","request_id":{quote(request_id)}{e}'
            f"{'null' if span_id is None else quote(span_id)}"
            f',"tenant_id":{"null" if tenant is None else quote(tenant)}'
            f',"timestamp":"{timestamp}"'
            f',"trace_id":{"null" if trace_id is None else quote(trace_id)}'
            f',"wire_version":"{WIRE_VERSION}"}}'
        )
        digest = sha256(header.encode()).digest()
        hash_ = digest.hex()
        end.frontier.push(digest)
        end.seq = seq
        end.hash = hash_
        # fmt: off
        sealed.append((
            WIRE_VERSION, id_, id_, timestamp, seq, code, action, severity, outcome,
            actor, actor_kind, behalf, service, node, tenant, client, target, category,
            domain, method, reason, request_id, trace_id, span_id, detail, class_,
            stored_at, None, FORM, prev_hash, hash_, salt, commitment,
        ))
        # fmt: on
    return sealed


def _fixed_runs(
    kind: tuple[str, ...], home: tuple[str, str]
) -> tuple[str, str, str, str, str]:
    """
    Spell the runs of a header between the values that change from row to row.
    """
    action, actor_kind, category, code, domain, method, outcome, class_, severity = map(
        quote, kind
    )
    service, node = map(quote, home)
    head = f'{{"action":{action},"actor_kind":{actor_kind},"canonical_form_id":"{FORM}"'
    place = f',"retention_class":{class_},"service_id":{service},"severity":{severity}'
    return (
        f'{head},"category":{category},"code":{code},"commitment":"',
        f'","domain":{domain},"id":',
        f',"method":{method},"monotonic_seq":',
        f',"outcome":{outcome},"prev_hash":"',
        f'{place},"source_node_id":{node},"span_id":',
    )


# --- erasable fields --------------------------------------------------------------

_HEX_32: Final = re.compile(r"[0-9a-f]{32}\Z")


class Salt(NamedTuple):
    """
    A salt column, read: the keys of the fields that stand, the leaves of those erased.
    """

    keys: Mapping[str, bytes]
    leaves: Mapping[str, str]

    @classmethod
    def read(cls, text: str, present: Iterable[str]) -> Salt:
        """
        Read the salt of a row in which the fields *present* are not null.

        Raises:
            ValueError: it is neither 32 hex digits nor what `erase` leaves.
        """
        if _HEX_32.match(text):
            return cls({field: _field_key(text, field) for field in present}, {})
        try:
            keys, leaves = _read_erased(text)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise ValueError("the salt was edited") from None
        return cls({field: bytes.fromhex(key) for field, key in keys.items()}, leaves)

    def leaf(self, field: str, value: str) -> str:
        """
        Return the leaf of a field that stands; a detail's *value* is its stored text.
        """
        text = value if field == "detail" else quote(value)
        return sha256(self.keys[field] + text.encode()).hexdigest()


def _field_key(salt: str, field: str) -> bytes:
    return sha256(f"{salt}:{field}".encode()).digest()


def _read_erased(text: str) -> tuple[dict[str, str], dict[str, str]]:
    read = json.loads(text)
    keys, leaves = read["keys"], read["leaves"]
    named = [*keys, *leaves]
    if (
        canonical_json({"keys": keys, "leaves": leaves}) != text
        or not leaves
        or len(set(named)) < len(named)
        or not set(named) <= set(COMMITTED_FIELDS)
        or not all(map(is_hash, [*keys.values(), *leaves.values()]))
    ):
        raise ValueError(text)
    return keys, leaves


def commitment_of(leaves: Mapping[str, str]) -> str:
    """
    Return the commitment to the *leaves* of a row's fields.
    """
    return sha256(_compact(leaves).encode()).hexdigest()


# Names and hex digits: of these json's C code makes RFC 8785, at a fifth of the cost.
_compact: Final = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode


def erase(row: Sequence[Any], fields: Iterable[str]) -> tuple[Any, ...]:
    """
    Empty *fields* of a sealed row in such a way that its hash stays valid.

    *row* is in the order of AUDIT_COLUMNS; so is what comes back. Fields that are
    empty already stay as they are, and so does the detail of fasten's own records:
    it is the evidence. A row with nothing left to erase comes back unchanged.

    Raises:
        ValueError: a field is not one that can be erased, or the row's salt is
            damaged.
    """
    values = dict(zip(AUDIT_COLUMNS, row, strict=True))
    asked = set(fields)
    for field in sorted(asked - set(COMMITTED_FIELDS)):
        raise ValueError(f"{field} cannot be erased; {', '.join(COMMITTED_FIELDS)} can")
    if values["domain"] == RECORD_DOMAIN and values["code"] in RECORD_CODES:
        asked.discard("detail")
    present = [field for field in COMMITTED_FIELDS if values[field] is not None]
    gone = [field for field in present if field in asked]
    if not gone:
        return tuple(row)
    salt = Salt.read(values["salt"] or "", present)
    leaves = {field: salt.leaf(field, values[field]) for field in gone}
    keys = {field: key.hex() for field, key in salt.keys.items() if field not in gone}
    kept = {"keys": keys, "leaves": {**salt.leaves, **leaves}}
    values |= dict.fromkeys(gone) | {"salt": canonical_json(kept)}
    return tuple(values.values())


# --- records --------------------------------------------------------------------


def cut(head: Head, rows: Iterable[tuple[int, str]]) -> dict[str, Any]:
    """
    Move *head*'s pruned-through over *rows*; return the cut for the sweep's record.

    *rows* are (monotonic_seq, hash) of the rows to delete: the oldest that the
    chain still has, in order, without a gap. The cut belongs into `detail.cuts` of
    a RETENTION_SWEEP_RAN row, written in the transaction that deletes.

    Raises:
        ValueError: there are no rows, or more than the chain has.
    """
    given = list(rows)
    total = head.pruned_count + len(given)
    if not given or total > head.count:
        raise ValueError(
            f"{len(given)} rows to cut from a chain of "
            f"{head.count - head.pruned_count}; cut the oldest, at least one"
        )
    frontier = Frontier.read(head.pruned_frontier, head.pruned_count)
    for _, digest in given:
        frontier.push(bytes.fromhex(digest))
    head.pruned_frontier = str(frontier)
    head.pruned_seq, head.pruned_hash = given[-1]
    head.pruned_count = total
    return restate(head) | {"from_seq": given[0][0], "count": len(given)}


def restate(head: Head) -> dict[str, Any]:
    """
    Return a cut of no rows that says how far *head* is pruned.

    A sweep that deletes the newest record naming a chain says it again in its own.
    """
    return {
        "service": head.service_id,
        "node": head.source_node_id,
        "class": head.retention_class,
        "from_seq": head.pruned_seq + 1,
        "to_seq": head.pruned_seq,
        "count": 0,
        "total": head.pruned_count,
        "last_hash": head.pruned_hash,
        "frontier": head.pruned_frontier,
    }


class Cut(NamedTuple):
    """
    How far one chain is pruned, as a sweep's record says.
    """

    key: ChainKey
    to_seq: int
    total: int
    last_hash: str
    frontier: str

    @classmethod
    def read(cls, said: Any) -> Cut | None:
        """
        Read one item of `detail.cuts`; None if it is none.
        """
        if not isinstance(said, dict):
            return None
        key = (said.get("service"), said.get("node"), said.get("class"))
        to_seq, total = said.get("to_seq"), said.get("total")
        last_hash, frontier = said.get("last_hash"), said.get("frontier")
        if not all(type(name) is str for name in key):
            return None
        if type(to_seq) is not int or type(total) is not int or not 0 < total <= to_seq:
            return None
        if not is_hash(last_hash) or not is_frontier(frontier, total):
            return None
        return cls(key, to_seq, total, last_hash, frontier)  # type: ignore[arg-type]


@attrs.frozen(kw_only=True)
class Restored:
    """
    A stretch of numbers that a store lost when it went back, as a record names it.

    *chains* maps each retention class that had lost rows to the (size, root) that
    are gone: the last that the writer, or a checkpoint, knew.
    """

    service_id: str
    source_node_id: str
    from_seq: int
    to_seq: int
    chains: Mapping[str, tuple[int, bytes]] = attrs.field(factory=dict)

    def detail(self) -> dict[str, Any]:
        """
        Return the detail of the CHAIN_RESTORED row that says so.
        """
        return {
            "service": self.service_id,
            "node": self.source_node_id,
            "from_seq": self.from_seq,
            "to_seq": self.to_seq,
            "chains": {
                name: {"size": size, "root": root.hex()}
                for name, (size, root) in self.chains.items()
            },
        }

    @classmethod
    def read(cls, said: Any) -> Restored | None:
        """
        Read what `detail` wrote; None if it is something else.
        """
        try:
            chains = {
                str(name): (int(lost["size"]), bytes.fromhex(lost["root"]))
                for name, lost in said["chains"].items()
            }
            span = (said["from_seq"], said["to_seq"])
            if not all(type(n) is int for n in span) or not 0 < span[0] <= span[1]:
                return None
            return cls(
                service_id=str(said["service"]),
                source_node_id=str(said["node"]),
                from_seq=span[0],
                to_seq=span[1],
                chains=chains,
            )
        except (KeyError, TypeError, ValueError, AttributeError):
            return None

    def explains(self, checkpoint: Checkpoint) -> bool:
        """
        Tell whether *checkpoint* is of the stretch that was lost.
        """
        service, node, class_ = checkpoint.key
        if (service, node) != (self.service_id, self.source_node_id):
            return False
        # Lost numbers are never used again: a checkpoint with one is of the old
        # history.
        if not self.from_seq <= checkpoint.seq <= self.to_seq:
            return False
        size, root = self.chains.get(class_, (0, b""))
        if checkpoint.size == size:
            return checkpoint.root == root
        return checkpoint.size < size


@attrs.frozen(kw_only=True)
class Memory:
    """
    What a writer knows of a node: its highest number, and (size, root) of each chain.
    """

    service_id: str
    source_node_id: str
    seq: int
    chains: Mapping[str, tuple[int, bytes]] = attrs.field(factory=dict)

    @classmethod
    def of(cls, service: str, node: str, seq: int, heads: Iterable[Head]) -> Memory:
        """
        Return what is to be remembered of a node as it stands.
        """
        roots = {
            head.retention_class: (
                head.count,
                Frontier.read(head.frontier, head.count).root(),
            )
            for head in heads
        }
        return cls(service_id=service, source_node_id=node, seq=seq, chains=roots)

    @classmethod
    def told(cls, said: Checkpoint) -> Memory:
        """
        Return what a checkpoint knows.
        """
        service, node, class_ = said.key
        chains = {class_: (said.size, said.root)}
        return cls(service_id=service, source_node_id=node, seq=said.seq, chains=chains)

    @classmethod
    def joined(cls, known: Iterable[Memory]) -> Memory | None:
        """
        Return the most that several know of one node; None if nobody knows anything.
        """
        joined: Memory | None = None
        for one in known:
            chains = dict(joined.chains) if joined else {}
            for name, (size, root) in one.chains.items():
                if size > chains.get(name, (0, b""))[0]:
                    chains[name] = size, root
            seq = max(one.seq, joined.seq if joined else 0)
            joined = attrs.evolve(one, seq=seq, chains=chains)
        return joined

    def encode(self) -> bytes:
        """
        Return it as bytes, for `decode`.
        """
        chains = {
            name: [size, root.hex()] for name, (size, root) in self.chains.items()
        }
        place = (self.service_id, self.source_node_id)
        return json.dumps([*place, self.seq, chains]).encode()

    @classmethod
    def decode(cls, data: bytes) -> Memory | None:
        """
        Read what `encode` wrote; None if it is something else.
        """
        try:
            service, node, seq, chains = json.loads(data)
            return cls(
                service_id=str(service),
                source_node_id=str(node),
                seq=int(seq),
                chains={
                    str(name): (int(size), bytes.fromhex(root))
                    for name, (size, root) in chains.items()
                },
            )
        except (TypeError, ValueError, AttributeError):
            return None


# --- checkpoints: C2SP signed notes ---------------------------------------------
# https://c2sp.org/signed-note and https://c2sp.org/tlog-checkpoint

_ED25519: Final = b"\x01"
_POSITIVE: Final = re.compile(r"[1-9][0-9]*\Z")
_DASH: Final = "\N{EM DASH} "


@attrs.frozen(kw_only=True)
class Checkpoint:
    """
    What a chain was at one moment: *size* rows, those cut included, under one root.
    """

    key: ChainKey
    size: int
    root: bytes
    seq: int

    @classmethod
    def of(cls, head: Head) -> Checkpoint:
        """
        Return the checkpoint of a chain as it stands.

        Raises:
            ValueError: the head was edited.
        """
        root = Frontier.read(head.frontier, head.count).root()
        return cls(key=head.key, size=head.count, root=root, seq=head.seq)

    @property
    def origin(self) -> str:
        """
        Return the chain's name, `<service>/<node>/<class>`, each percent-encoded.
        """
        return "/".join(percent_encode(part, safe="") for part in self.key)

    def body(self) -> str:
        """
        Return the text that is signed.
        """
        root = b64encode(self.root).decode()
        return f"{self.origin}\n{self.size}\n{root}\nmonotonic_seq {self.seq}\n"

    def sign(self, signers: Iterable[Signer]) -> str:
        """
        Return the signed note, one signature line for each signer.
        """
        body = self.body()
        lines = [
            f"{_DASH}{signer.name} "
            f"{b64encode(signer.key_hash + signer.sign(body.encode())).decode()}\n"
            for signer in signers
        ]
        return f"{body}\n{''.join(lines)}"


@attrs.frozen(kw_only=True)
class Signer:
    """
    A private key that signs checkpoints; *vkey* is its public half, to hand out.
    """

    name: str
    vkey: str
    key_hash: bytes
    sign: Callable[[bytes], bytes] = attrs.field(repr=False)


@attrs.frozen(kw_only=True)
class Verifier:
    """
    A public key: `is_signed(signature, message)` tells whether it fits.
    """

    name: str
    key_hash: bytes
    is_signed: Callable[[bytes, bytes], bool] = attrs.field(repr=False)


def _key_hash(name: str, public: bytes) -> bytes:
    return sha256(name.encode() + b"\n" + _ED25519 + public).digest()[:4]


def ed25519_signer(service: str, secret: str) -> Signer:
    """
    Make a signer from the base64 of a 32-byte seed, or from the text of a PEM.

    Raises:
        MissingExtra: `cryptography` is not installed.
        ValueError: *secret* is neither.
    """
    private = _private_key(secret)
    public = private.public_key().public_bytes_raw()
    # A key name holds neither white space nor a plus sign.
    name = percent_encode(service, safe="")
    key_hash = _key_hash(name, public)
    encoded = b64encode(_ED25519 + public).decode()
    return Signer(
        name=name,
        vkey=f"{name}+{key_hash.hex()}+{encoded}",
        key_hash=key_hash,
        sign=private.sign,
    )


def _private_key(secret: str) -> Any:
    ed25519 = _ed25519()
    if "-----BEGIN" in secret:
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        try:
            key = load_pem_private_key(secret.encode(), None)
        except (ValueError, TypeError):
            key = None
        if not isinstance(key, ed25519.Ed25519PrivateKey):
            raise ValueError(
                "the PEM holds no Ed25519 key; make one with fasten keygen"
            )
        return key
    try:
        seed = b64decode(secret, validate=True)
        return ed25519.Ed25519PrivateKey.from_private_bytes(seed)
    except ValueError:
        raise ValueError(
            "the signing key is not the base64 of 32 bytes; make one with fasten keygen"
        ) from None


def ed25519_verifier(vkey: str) -> Verifier:
    """
    Make a verifier from a vkey, `name+hash+base64`.

    Raises:
        MissingExtra: `cryptography` is not installed.
        ValueError: *vkey* is not one.
    """
    ed25519 = _ed25519()
    name, _, rest = vkey.strip().partition("+")
    hex_hash, _, encoded = rest.partition("+")
    try:
        raw = b64decode(encoded, validate=True)
        if raw[:1] != _ED25519 or _key_hash(name, raw[1:]).hex() != hex_hash:
            raise ValueError(vkey)
        public = ed25519.Ed25519PublicKey.from_public_bytes(raw[1:])
    except ValueError:
        raise ValueError(
            f"{vkey!r} is no Ed25519 vkey (name+hash+base64); "
            "copy the line that fasten keygen printed"
        ) from None
    return Verifier(
        name=name,
        key_hash=bytes.fromhex(hex_hash),
        is_signed=lambda signature, message: _fits(public, signature, message),
    )


def _fits(public: Any, signature: bytes, message: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature

    try:
        public.verify(signature, message)
    except InvalidSignature:
        return False
    return True


def _ed25519() -> Any:
    # An extra: only who signs or checks checkpoints needs it.
    try:
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise MissingExtra(
            "checkpoints need the package cryptography; pip install 'fasten[seal]'"
        ) from None
    return ed25519


@attrs.frozen(kw_only=True)
class Note:
    """
    A signed checkpoint as read; nothing about its signatures is known yet.
    """

    checkpoint: Checkpoint
    body: str
    signatures: tuple[tuple[str, bytes, bytes], ...]

    @classmethod
    def parse(cls, text: str) -> Note:
        """
        Read a note.

        Raises:
            ValueError: it is none, or not one of a chain of fasten.
        """
        body, _, rest = text.rpartition("\n\n")
        lines = rest.split("\n")
        if lines.pop() or not lines:
            raise ValueError("a note ends with lines of signatures")
        return cls(
            checkpoint=_read_body(f"{body}\n"),
            body=f"{body}\n",
            signatures=tuple(map(_read_signature, lines)),
        )

    def verdict(
        self, verifiers: Iterable[Verifier]
    ) -> Literal["good", "bad", "unknown"]:
        """
        Tell whether a known key signed the note; one wrong signature spoils it.

        Only keys named as the chain's service speak for it: `unknown` is a note that
        a key of that name signed, but none of *verifiers*.
        """
        owner = self.checkpoint.origin.partition("/")[0]
        keys = [verifier for verifier in verifiers if verifier.name == owner]
        told = {
            self._told(keys, key_hash, signature)
            for name, key_hash, signature in self.signatures
            if name == owner
        }
        if not told or "bad" in told:
            return "bad"
        return "good" if "good" in told else "unknown"

    def _told(
        self, keys: Iterable[Verifier], key_hash: bytes, signature: bytes
    ) -> Literal["good", "bad", "unknown"]:
        message = self.body.encode()
        for key in keys:
            is_named = key.key_hash == key_hash
            if key.is_signed(signature, message) != is_named:
                # Also a good signature under another key's number: it was edited.
                return "bad"
            if is_named:
                return "good"
        return "unknown"


def _read_body(body: str) -> Checkpoint:
    origin, size, root, *more = body.split("\n")
    parts = [percent_decode(part, errors="strict") for part in origin.split("/")]
    seq = next((m[14:] for m in more if m.startswith("monotonic_seq ")), "")
    raw = b64decode(root, validate=True)
    if len(parts) != 3 or len(raw) != 32:
        raise ValueError("a checkpoint names a chain and a root of 32 bytes")
    if not _POSITIVE.match(size) or not _POSITIVE.match(seq):
        raise ValueError("size and monotonic_seq of a checkpoint are numbers from 1")
    found = Checkpoint(
        key=(parts[0], parts[1], parts[2]), size=int(size), root=raw, seq=int(seq)
    )
    # Further lines are of a newer version. A lone surrogate is a ValueError, too.
    if not body.encode().startswith(found.body().encode()):
        raise ValueError("a checkpoint is spelled in one way only")
    return found


def _read_signature(line: str) -> tuple[str, bytes, bytes]:
    name, _, encoded = line.removeprefix(_DASH).partition(" ")
    raw = b64decode(encoded, validate=True)
    if f"{_DASH}{name} {b64encode(raw).decode()}" != line or not name or len(raw) < 5:
        raise ValueError("a signature line is a dash, a name and base64")
    return name, raw[:4], raw[4:]


def split_notes(text: str) -> list[str]:
    """
    Return the notes in what `fasten checkpoint`, or a service on stdout, printed.

    They stand one after the other, or as NDJSON lines of shape `checkpoint`; other
    lines of NDJSON are passed over.
    """
    notes: list[str] = []
    lines: list[str] = []
    for line in text.split("\n"):
        if line.startswith("{"):
            notes += _note_in(line)
            continue
        if lines and lines[-1].startswith(_DASH) and not line.startswith(_DASH):
            notes.append("\n".join([*lines, ""]))
            lines = []
        if line or lines:
            lines.append(line)
    return notes + (["\n".join([*lines, ""])] if any(lines) else [])


def _note_in(line: str) -> list[str]:
    try:
        read = json.loads(line)
    except (ValueError, RecursionError):
        return []
    is_note = read.get("shape") == "checkpoint" and isinstance(read.get("note"), str)
    return [read["note"]] if is_note else []
