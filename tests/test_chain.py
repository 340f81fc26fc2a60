# SPDX-License-Identifier: Apache-2.0
"""
Tests of the seal: held against json, hashlib and rfc8785, and published vectors.
"""

from __future__ import annotations

import builtins
import json
from base64 import b64decode, b64encode
from hashlib import sha256
from pathlib import Path
from typing import Any

import attrs
import pytest
import rfc8785
from hypothesis import given, settings
from hypothesis import strategies as st

from fasten import chain
from fasten.errors import MissingExtra
from fasten.rows import AUDIT_COLUMNS, Pending, canonical_json, parse_timestamp
from tests.ledger import SEED, Ledger, edited, value
from tests.outside import ROOT

FORMS = json.loads((ROOT / "conformance" / "forms.json").read_text(encoding="utf-8"))
COMMITTED = ("actor", "client", "detail", "on_behalf_of", "reason", "target")
LEFT_OUT = {*COMMITTED, "salt", "hash", "shipped_at", "stored_at"}

# The test tree of certificate-transparency's reference implementation.
LEAVES = (
    "",
    "00",
    "10",
    "2021",
    "3031",
    "40414243",
    "5051525354555657",
    "606162636465666768696a6b6c6d6e6f",
)
ROOTS = (
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
)


def wire(row: tuple[Any, ...]) -> dict[str, Any]:
    """
    Return a row as JSON readers see it, numbers as doubles.
    """
    read = dict(zip(AUDIT_COLUMNS, row, strict=True))
    if read["detail"] is not None:
        read["detail"] = json.loads(read["detail"], parse_int=float)
    return read


def recomputed(row: dict[str, Any]) -> tuple[str, str]:
    """
    Compute commitment and hash of a wire row from the text of the design alone.
    """
    leaves = {}
    for field in COMMITTED:
        if row[field] is not None:
            key = sha256(f"{row['salt']}:{field}".encode("ascii")).digest()
            leaves[field] = sha256(key + rfc8785.dumps(row[field])).hexdigest()
    commitment = sha256(rfc8785.dumps(leaves)).hexdigest()
    header = {k: v for k, v in row.items() if k not in LEFT_OUT}
    header["commitment"] = commitment
    return commitment, sha256(rfc8785.dumps(header)).hexdigest()


def sealed(*rows: Pending, heads: dict[str, chain.Head] | None = None, **given: Any):
    """
    Seal rows with zeroes for salt.
    """
    options = {"service": "shop", "node": "n1", "first_seq": 1} | given
    salts = bytes(chain.SALT_BYTES * len(rows))
    return chain.seal(
        rows, heads={} if heads is None else heads, salts=salts, **options
    )


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
MAYBE = st.none() | TEXT
NUMBER = st.integers(-(2**53) + 1, 2**53 - 1) | st.floats(
    allow_nan=False, allow_infinity=False
)
DETAIL = st.dictionaries(
    TEXT,
    st.recursive(
        st.none() | st.booleans() | NUMBER | TEXT,
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3)
        ),
        max_leaves=8,
    ),
    max_size=4,
)
PENDING = st.builds(
    Pending,
    id=TEXT,
    timestamp_us=st.integers(0, 253_402_300_799_999_999),
    code=TEXT,
    action=TEXT,
    severity=TEXT,
    category=TEXT,
    domain=TEXT,
    retention_class=st.sampled_from(["short", "medium", "long"]),
    outcome=TEXT,
    actor=TEXT,
    actor_kind=TEXT,
    on_behalf_of=MAYBE,
    tenant_id=MAYBE,
    client=MAYBE,
    target=TEXT,
    method=TEXT,
    reason=MAYBE,
    request_id=TEXT,
    trace_id=MAYBE,
    span_id=MAYBE,
    detail=DETAIL.map(canonical_json),
)


class TestSeal:
    @given(st.lists(PENDING, max_size=3), TEXT, TEXT)
    @settings(max_examples=60)
    def test_agrees_with_an_independent_checker(self, rows, service, node):
        """
        Commitment and hash are what json, hashlib and rfc8785 make of the wire row.
        """
        found = [wire(row) for row in sealed(*rows, service=service, node=node)]

        assert [recomputed(row) for row in found] == [
            (row["commitment"], row["hash"]) for row in found
        ]

    @given(st.lists(PENDING, min_size=1, max_size=3))
    @settings(max_examples=40)
    def test_carries_every_value_of_the_row(self, rows):
        """
        What was emitted stands in the column of its name, unchanged.
        """
        found = [dict(zip(AUDIT_COLUMNS, row, strict=True)) for row in sealed(*rows)]
        expected = [row._asdict() for row in rows]
        for given_row in expected:
            given_row["timestamp"] = given_row.pop("timestamp_us")

        assert expected == [
            {k: parse_timestamp(r[k]) if k == "timestamp" else r[k] for k in e}
            for e, r in zip(expected, found, strict=True)
        ]

    def test_numbers_run_across_classes_and_links_within(self):
        """
        monotonic_seq counts all rows of the node, prev_hash links those of a class.
        """
        log = Ledger()
        first = log.emit("n1", "short", "long", "short")
        second = log.emit("n1", "long", "medium")
        rows = [wire(row) for row in [*first, *second]]

        assert [1, 2, 3, 4, 5] == [row["monotonic_seq"] for row in rows]
        assert [
            "genesis",
            "genesis",
            rows[0]["hash"],
            rows[1]["hash"],
            "genesis",
        ] == [row["prev_hash"] for row in rows]

    def test_moves_the_heads_of_its_classes_only(self):
        """
        Each head ends at the last row of its class; others stay as they were.
        """
        log = Ledger()
        log.emit("n1", "short")
        before = attrs.evolve(log.heads["shop", "n1", "short"])
        rows = log.emit("n1", "long", "long")
        frontier = chain.Frontier()
        for row in rows:
            frontier.push(bytes.fromhex(value(row, "hash")))

        assert before == log.heads["shop", "n1", "short"]
        assert log.heads["shop", "n1", "long"] == chain.Head(
            service_id="shop",
            source_node_id="n1",
            retention_class="long",
            seq=3,
            hash=value(rows[1], "hash"),
            count=2,
            frontier=str(frontier),
        )

    def test_batches_may_be_cut_anywhere(self):
        """
        One batch of ten seals as ten batches of one.
        """
        rows = [Ledger().pending(class_) for class_ in ["short", "long"] * 5]
        heads: dict[str, chain.Head] = {}
        one_by_one = [
            sealed(row, heads=heads, first_seq=seq)[0]
            for seq, row in enumerate(rows, 1)
        ]
        whole: dict[str, chain.Head] = {}

        assert sealed(*rows, heads=whole) == one_by_one
        assert whole == heads

    def test_takes_plain_tuples(self):
        """
        The hot path hands over tuples, not Pending.
        """
        row = Ledger().pending()

        assert sealed(row) == sealed(tuple(row))

    def test_salts_are_the_given_bytes(self):
        """
        Each row gets 16 of the random bytes, as lower hex.
        """
        rows = [Ledger().pending(), Ledger().pending()]
        found = chain.seal(
            rows, service="s", node="n", first_seq=1, heads={}, salts=bytes(range(32))
        )

        assert [bytes(range(16)).hex(), bytes(range(16, 32)).hex()] == [
            value(row, "salt") for row in found
        ]

    def test_too_few_random_bytes_are_refused(self):
        """
        A row without a salt of its own could be guessed back.
        """
        with pytest.raises(ValueError, match="16 bytes of salt for 2 rows"):
            chain.seal(
                [Ledger().pending()] * 2,
                service="s",
                node="n",
                first_seq=1,
                heads={},
                salts=bytes(16),
            )

    def test_a_row_that_cannot_be_sealed_leaves_the_heads(self):
        """
        A lone surrogate in the second row: no head has moved.
        """
        heads: dict[str, chain.Head] = {}
        rows = [Ledger().pending(), Ledger().pending(actor="\ud800")]
        with pytest.raises(ValueError, match="surrogates not allowed"):
            sealed(*rows, heads=heads)

        assert heads == {}

    def test_an_edited_head_is_refused_with_the_cure(self):
        """
        Nothing is sealed onto a frontier that cannot be one.
        """
        log = Ledger()
        log.emit("n1", "short", "short")
        log.heads["shop", "n1", "short"].frontier = "00"
        with pytest.raises(ValueError, match="run fasten verify"):
            log.emit("n1", "short")

        assert log.heads["shop", "n1", "short"].count == 2


class TestConformance:
    def test_the_keys_of_the_form_are_the_frozen_ones(self):
        """
        A released form never changes its keys.
        """
        form = FORMS["forms"]["3"]

        assert form["header_keys"] == list(chain.HEADER_KEYS)
        assert form["committed_keys"] == list(chain.COMMITTED_FIELDS)
        assert set(form["unsealed_keys"]) == set(AUDIT_COLUMNS) - set(
            chain.HEADER_KEYS
        ) - set(chain.COMMITTED_FIELDS)

    @pytest.mark.parametrize("vector", FORMS["rows"], ids=lambda v: v["name"])
    def test_vectors_agree_with_the_independent_checker(self, vector):
        """
        Each published row can be recomputed from the text of the design.
        """
        row = vector["wire_row"]
        header = {k: v for k, v in row.items() if k not in LEFT_OUT}

        assert (row["commitment"], row["hash"]) == recomputed(row)
        assert vector["hashed_bytes_utf8"] == rfc8785.dumps(header).decode()

    @pytest.mark.parametrize("vector", FORMS["rows"], ids=lambda v: v["name"])
    def test_seal_makes_the_vectors(self, vector):
        """
        Given the same values and salt, `seal` writes the published row.
        """
        row = dict(vector["wire_row"])
        pending = Pending(
            timestamp_us=parse_timestamp(row["timestamp"]),
            detail=rfc8785.dumps(row["detail"]).decode(),
            **{
                f: row[f]
                for f in Pending._fields
                if f not in ("timestamp_us", "detail")
            },
        )
        head = chain.Head(
            service_id=row["service_id"],
            source_node_id=row["source_node_id"],
            retention_class=row["retention_class"],
            hash=row["prev_hash"],
        )
        (found,) = chain.seal(
            [pending],
            service=row["service_id"],
            node=row["source_node_id"],
            first_seq=row["monotonic_seq"],
            heads={row["retention_class"]: head},
            salts=bytes.fromhex(row["salt"]),
            stored_at=row["stored_at"],
        )

        assert row == wire(found)

    @pytest.mark.parametrize("vector", FORMS["rows"], ids=lambda v: v["name"])
    def test_leaves_of_the_vectors(self, vector):
        """
        The leaves shown beside a row are those that its commitment commits to.
        """
        row = vector["wire_row"]
        salt = chain.Salt.read(row["salt"], vector["leaves"])
        leaves = {
            field: salt.leaf(
                field, canonical_json(row[field]) if field == "detail" else row[field]
            )
            for field in COMMITTED
            if row[field] is not None
        }

        assert vector["leaves"] == leaves
        assert row["commitment"] == chain.commitment_of(leaves)

    def test_erasure_vector(self):
        """
        Erasing the published fields of the published row gives the published salt.
        """
        vector = FORMS["erasure"]
        before = next(v for v in FORMS["rows"] if v["name"] == vector["row"])[
            "wire_row"
        ]
        columns = [before[name] for name in AUDIT_COLUMNS]
        columns[AUDIT_COLUMNS.index("detail")] = canonical_json(before["detail"])

        assert vector["wire_row"] == wire(chain.erase(columns, vector["fields"]))

    def test_frontier_vectors(self):
        """
        The frontiers and roots over the published hashes are the published ones.
        """
        frontier = chain.Frontier()
        found = []
        for step in FORMS["frontiers"]:
            frontier.push(bytes.fromhex(step["hash"]))
            found.append(
                step
                | {
                    "size": frontier.size,
                    "frontier": str(frontier),
                    "root": frontier.root().hex(),
                }
            )

        assert FORMS["frontiers"] == found

    def test_checkpoint_vector(self):
        """
        The published key signs the published note (Ed25519 is deterministic).
        """
        vector = FORMS["checkpoint"]
        signer = chain.ed25519_signer(vector["service"], vector["secret"])
        said = chain.Note.parse(vector["note"])

        assert vector["vkey"] == signer.vkey
        assert vector["note"] == said.checkpoint.sign([signer])
        assert said.verdict([chain.ed25519_verifier(vector["vkey"])]) == "good"


class TestFrontier:
    def test_published_roots(self):
        """
        The eight sizes of the reference tree have their published roots.
        """
        frontier = chain.Frontier()
        found = []
        for leaf in LEAVES:
            frontier.push(bytes.fromhex(leaf))
            found.append(frontier.root().hex())

        assert list(ROOTS) == found

    def test_the_empty_tree(self):
        """
        The root of nothing is the hash of nothing.
        """
        assert sha256(b"").digest() == chain.Frontier().root()

    @given(st.lists(st.binary(min_size=32, max_size=32), max_size=40))
    def test_equals_the_recursive_definition(self, digests):
        """
        The frontier's root is the Merkle tree hash of RFC 6962, section 2.1.
        """

        def tree(leaves: list[bytes]) -> bytes:
            if not leaves:
                return sha256(b"").digest()
            if len(leaves) == 1:
                return sha256(b"\x00" + leaves[0]).digest()
            half = 1 << ((len(leaves) - 1).bit_length() - 1)
            return sha256(b"\x01" + tree(leaves[:half]) + tree(leaves[half:])).digest()

        frontier = chain.Frontier()
        for digest in digests:
            frontier.push(digest)

        assert tree(digests) == frontier.root()

    @given(st.integers(0, 70), st.integers(0, 70))
    def test_text_and_back(self, before, after):
        """
        A frontier read from its text goes on as if it had never been written.
        """
        one, other = chain.Frontier(), chain.Frontier()
        for number in range(before):
            one.push(number.to_bytes(32))
            other.push(number.to_bytes(32))
        other = chain.Frontier.read(str(other), other.size)
        for number in range(after):
            one.push(number.to_bytes(32))
            other.push(number.to_bytes(32))

        assert (str(one), one.size, one.root()) == (
            str(other),
            other.size,
            other.root(),
        )

    @pytest.mark.parametrize(
        ("text", "size"),
        [("", 1), ("00" * 32, 0), ("00" * 31, 1), ("00" * 32, 3), ("0G" * 32, 1)],
    )
    def test_what_is_no_frontier_of_that_size(self, text, size):
        """
        A frontier has a root for each 1 bit of its size.
        """
        with pytest.raises(ValueError, match="was edited; run fasten verify"):
            chain.Frontier.read(text, size)

        assert not chain.is_frontier(text, size)

    @pytest.mark.parametrize("size", [None, "1", True, -1, 1.0])
    def test_sizes_that_are_none(self, size):
        """
        Whatever stands in an edited column is looked at without an error.
        """
        assert not chain.is_frontier("", size)


class TestErase:
    def test_keeps_commitment_and_hash(self):
        """
        Only the erased columns and the salt change.
        """
        (row,) = sealed(Ledger().pending())
        gone = chain.erase(row, ["actor", "detail"])
        changed = {
            name for name, a, b in zip(AUDIT_COLUMNS, row, gone, strict=True) if a != b
        }

        assert {"actor", "detail", "salt"} == changed
        assert (value(gone, "actor"), value(gone, "detail")) == (None, None)

    @given(PENDING, st.permutations(COMMITTED), st.integers(0, 6))
    def test_step_by_step_is_at_once(self, pending, order, split):
        """
        The commitment can be recomputed after any sequence of erasures.
        """
        (row,) = sealed(pending)
        at_once = chain.erase(row, order)
        in_steps = chain.erase(chain.erase(row, order[:split]), order[split:])
        salt = json.loads(value(at_once, "salt"))

        assert at_once == in_steps
        assert {} == salt["keys"]
        assert value(row, "commitment") == chain.commitment_of(salt["leaves"])

    def test_what_is_null_stays_out_of_the_salt(self):
        """
        A field that was never given leaves no leaf when it is erased.
        """
        (row,) = sealed(Ledger().pending(client=None, reason=None))

        assert row == chain.erase(row, ["client", "reason"])
        assert "client" not in value(chain.erase(row, ["client", "actor"]), "salt")

    def test_twice_is_once(self):
        """
        What is erased already is left alone.
        """
        (row,) = sealed(Ledger().pending())
        once = chain.erase(row, ["actor"])

        assert once == chain.erase(once, ["actor"])

    def test_the_salt_no_longer_tells_the_erased_key(self):
        """
        Neither the salt nor the key of an erased field is left to guess with.
        """
        (row,) = sealed(Ledger().pending())
        salt = value(row, "salt")
        left = value(chain.erase(row, ["actor"]), "salt")

        assert salt not in left
        assert sha256(f"{salt}:actor".encode()).hexdigest() not in left

    @pytest.mark.parametrize("code", chain.RECORD_CODES)
    def test_the_detail_of_a_record_stays(self, code):
        """
        Erasing an operator must not erase the evidence of what he did.
        """
        (row,) = sealed(Ledger().pending(code=code, domain="fasten"))
        gone = chain.erase(row, ["actor", "detail"])

        assert value(gone, "actor") is None
        assert value(row, "detail") == value(gone, "detail")

    def test_other_columns_cannot_be_erased(self):
        """
        The message names the field and those that can be.
        """
        (row,) = sealed(Ledger().pending())
        with pytest.raises(ValueError, match="code cannot be erased; actor, client"):
            chain.erase(row, ["actor", "code"])

    @pytest.mark.parametrize("salt", [None, "", "xyz", '{"keys":{},"leaves":{}}', "[]"])
    def test_a_damaged_salt_is_refused(self, salt):
        """
        Erasing with a wrong key would make the damage look like an erasure.
        """
        (row,) = sealed(Ledger().pending())
        with pytest.raises(ValueError, match="the salt was edited"):
            chain.erase(edited(row, salt=salt), ["actor"])


class TestCut:
    def test_moves_pruned_through(self):
        """
        The head tells of the rows cut, and the cut of the head.
        """
        log = Ledger()
        rows = log.emit("n1", *["short"] * 5)
        head = log.heads["shop", "n1", "short"]
        said = chain.cut(head, [(r[4], value(r, "hash")) for r in rows[:3]])
        frontier = chain.Frontier()
        for row in rows[:3]:
            frontier.push(bytes.fromhex(value(row, "hash")))

        assert said == {
            "service": "shop",
            "node": "n1",
            "class": "short",
            "from_seq": 1,
            "to_seq": 3,
            "count": 3,
            "total": 3,
            "last_hash": value(rows[2], "hash"),
            "frontier": str(frontier),
        }
        assert (3, said["last_hash"], 3, str(frontier)) == (
            head.pruned_seq,
            head.pruned_hash,
            head.pruned_count,
            head.pruned_frontier,
        )

    def test_second_cut_counts_on(self):
        """
        `total` counts every row that was ever cut, `count` those of this cut.
        """
        log = Ledger()
        rows = log.emit("n1", *["short"] * 5)
        pairs = [(r[4], value(r, "hash")) for r in rows]
        head = log.heads["shop", "n1", "short"]
        chain.cut(head, pairs[:3])
        said = chain.cut(head, pairs[3:])

        assert (4, 5, 2, 5) == (
            said["from_seq"],
            said["to_seq"],
            said["count"],
            said["total"],
        )
        assert head.frontier == head.pruned_frontier

    def test_restating_says_the_same_without_rows(self):
        """
        A later sweep can repeat how far a chain is pruned.
        """
        log = Ledger()
        rows = log.emit("n1", "short", "short")
        head = log.heads["shop", "n1", "short"]
        said = chain.cut(head, [(r[4], value(r, "hash")) for r in rows[:1]])

        assert said | {"from_seq": 2, "count": 0} == chain.restate(head)
        assert chain.Cut.read(said) == chain.Cut.read(chain.restate(head))

    @pytest.mark.parametrize("rows", [[], [(1, "ab")] * 3])
    def test_impossible_cuts_are_refused(self, rows):
        """
        No rows, or more than there are, is a mistake of the sweep.
        """
        log = Ledger()
        log.emit("n1", "short", "short")
        with pytest.raises(ValueError, match="rows to cut from a chain of 2"):
            chain.cut(log.heads["shop", "n1", "short"], rows)

    @pytest.mark.parametrize(
        "change",
        [
            {"service": None},
            {"to_seq": "3"},
            {"total": True},
            {"total": 0},
            {"to_seq": 1},
            {"last_hash": "x"},
            {"frontier": ""},
        ],
    )
    def test_what_is_no_cut_is_no_evidence(self, change):
        """
        A record that fasten cannot have written is read as none.
        """
        log = Ledger()
        rows = log.emit("n1", *["short"] * 3)
        head = log.heads["shop", "n1", "short"]
        said = chain.cut(head, [(r[4], value(r, "hash")) for r in rows[:2]])

        assert chain.Cut.read(said) is not None
        assert chain.Cut.read(said | change) is None
        assert chain.Cut.read([said]) is None


class TestRestored:
    SAID = chain.Restored(
        service_id="shop",
        source_node_id="n1",
        from_seq=5,
        to_seq=9,
        chains={"short": (7, b"r" * 32)},
    )

    def test_detail_and_back(self):
        """
        What the record says can be read again.
        """
        detail = json.loads(canonical_json(self.SAID.detail()))

        assert self.SAID == chain.Restored.read(detail)

    @pytest.mark.parametrize(
        "change",
        [
            {"from_seq": 0},
            {"to_seq": 4},
            {"to_seq": "9"},
            {"chains": [1]},
            {"node": ...},
        ],
    )
    def test_what_is_no_record(self, change):
        """
        A detail of another shape explains nothing.
        """
        detail = self.SAID.detail() | change
        if change == {"node": ...}:
            del detail["node"]

        assert chain.Restored.read(detail) is None

    @pytest.mark.parametrize(
        ("expected", "change"),
        [
            (True, {}),
            (True, {"size": 6, "seq": 8, "root": b"x" * 32}),
            (False, {"root": b"x" * 32}),
            (False, {"size": 8}),
            (False, {"seq": 4}),
            (False, {"seq": 10}),
            (False, {"key": ("shop", "n2", "short")}),
            (False, {"key": ("shop", "n1", "long")}),
        ],
    )
    def test_explains_checkpoints_of_the_lost_stretch_only(self, expected, change):
        """
        Number, size and root must be of the history that is gone.
        """
        said = {"key": ("shop", "n1", "short"), "size": 7, "root": b"r" * 32, "seq": 9}

        assert expected == self.SAID.explains(chain.Checkpoint(**said | change))


class TestCheckpoint:
    def checkpoint(self, *key: str) -> chain.Checkpoint:
        return chain.Checkpoint(
            key=key or ("shop", "n1", "short"), size=7, root=bytes(32), seq=9
        )

    def test_note_of_the_go_implementation(self):
        """
        Key hash and signature of the published example of signed notes fit.
        """
        verifier = chain.ed25519_verifier(
            "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
        )
        text = (
            "If you think cryptography is the answer to your problem,\n"
            "then you don't know what your problem is.\n"
        )
        raw = b64decode(
            "x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdng"
            "otpRZb6KE6RyyBwJnAM="
        )

        assert verifier.key_hash == raw[:4]
        assert verifier.is_signed(raw[4:], text.encode())
        assert not verifier.is_signed(raw[4:], text.upper().encode())

    def test_body_is_a_checkpoint_with_one_extension(self):
        """
        Origin, size, root, monotonic_seq: a line each.
        """
        said = self.checkpoint("my shop", "a/b", "short")

        assert (
            "my%20shop/a%2Fb/short\n7\n"
            "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=\nmonotonic_seq 9\n"
        ) == said.body()

    @given(st.tuples(TEXT, TEXT, TEXT), st.integers(1), st.integers(1))
    def test_sign_and_parse(self, key, size, seq):
        """
        Whatever the names, a note is read as what was signed.
        """
        said = chain.Checkpoint(key=key, size=size, root=bytes(32), seq=seq)
        signer = chain.ed25519_signer(key[0] or "x", SEED)
        note = chain.Note.parse(said.sign([signer]))

        assert said == note.checkpoint
        assert [signer.name] == [name for name, _, _ in note.signatures]

    def test_of_a_head(self):
        """
        Size, root and number are those of the chain as it stands.
        """
        log = Ledger()
        rows = log.emit("n1", "short", "short")
        frontier = chain.Frontier()
        for row in rows:
            frontier.push(bytes.fromhex(value(row, "hash")))
        said = chain.Checkpoint.of(log.heads["shop", "n1", "short"])

        assert said == chain.Checkpoint(
            key=("shop", "n1", "short"), size=2, root=frontier.root(), seq=2
        )

    def test_several_keys_sign(self):
        """
        During a rotation either key alone verifies the note.
        """
        signers = [
            chain.ed25519_signer("shop", secret)
            for secret in (SEED, b64encode(bytes(32)).decode())
        ]
        note = chain.Note.parse(self.checkpoint().sign(signers))
        verdicts = [note.verdict([chain.ed25519_verifier(s.vkey)]) for s in signers]

        assert ["good", "good"] == verdicts

    def test_one_wrong_signature_spoils_the_note(self):
        """
        A known key whose signature does not fit outweighs one that fits.
        """
        signers = [
            chain.ed25519_signer("shop", secret)
            for secret in (SEED, b64encode(bytes(32)).decode())
        ]
        wrong = attrs.evolve(signers[1], sign=lambda _: bytes(64))
        note = chain.Note.parse(self.checkpoint().sign([signers[0], wrong]))
        keys = [chain.ed25519_verifier(s.vkey) for s in signers]

        assert note.verdict(keys) == "bad"
        assert note.verdict(keys[:1]) == "good"

    def test_only_the_service_speaks_for_its_chains(self):
        """
        The key of another service is no key for this chain.
        """
        signer = chain.ed25519_signer("billing", SEED)
        note = chain.Note.parse(self.checkpoint().sign([signer]))

        assert note.verdict([chain.ed25519_verifier(signer.vkey)]) == "bad"

    def test_another_key_of_the_service(self):
        """
        A key that is not given may have been rotated out: nothing is known.
        """
        other = chain.ed25519_signer("shop", b64encode(bytes(32)).decode())
        key = chain.ed25519_verifier(chain.ed25519_signer("shop", SEED).vkey)
        note = chain.Note.parse(self.checkpoint().sign([other]))

        assert (note.verdict([key]), note.verdict([])) == ("unknown", "unknown")

    def test_an_edited_key_number_is_no_rotation(self):
        """
        A signature that fits under another number was made to look foreign.
        """
        signer = chain.ed25519_signer("shop", SEED)
        forged = attrs.evolve(signer, key_hash=b"abcd")
        note = chain.Note.parse(self.checkpoint().sign([forged]))

        assert note.verdict([chain.ed25519_verifier(signer.vkey)]) == "bad"

    def test_every_character_of_a_note(self):
        """
        Whichever character is flipped, the note is spoilt.
        """
        signer = chain.ed25519_signer("shop", SEED)
        keys = [chain.ed25519_verifier(signer.vkey)]
        text = self.checkpoint().sign([signer])
        passed = []
        for at, old in enumerate(text):
            forged = f"{text[:at]}{chr(ord(old) ^ 1)}{text[at + 1 :]}"
            try:
                verdict = chain.Note.parse(forged).verdict(keys)
            except ValueError:
                continue
            passed += [at] if verdict != "bad" else []

        assert [] == passed

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ("\n7\n", "\n07\n"),
            ("\n7\n", "\n0\n"),
            ("\n7\n", "\nx\n"),
            ("AAA=\n", "AAB=\n"),
            ("AAA=\n", "AA==\n"),
            ("AAA=\n", "\n"),
            ("monotonic_seq 9", "monotonic_seq -9"),
            ("monotonic_seq 9\n", ""),
            ("shop/", "shop/x/"),
            ("shop/", "%73hop/"),
            ("shop/", "%ff/"),
            ("\n\n", "\n"),
            ("\N{EM DASH} ", "- "),
            ("\N{EM DASH} shop ", "\N{EM DASH} shop"),
        ],
    )
    def test_what_is_no_note(self, old, new):
        """
        A checkpoint has one spelling; anything else is refused.
        """
        text = self.checkpoint().sign([chain.ed25519_signer("shop", SEED)])
        assert old in text
        with pytest.raises(ValueError, match=r"\w"):
            chain.Note.parse(text.replace(old, new, 1))

    @pytest.mark.parametrize("text", ["", "\n\n", "a\nb\nc", "\ud800\n1\n\n", "x" * 99])
    def test_noise_is_no_note(self, text):
        """
        Whatever is read from a file or a table, only ValueError comes of it.
        """
        with pytest.raises(ValueError, match=r"\w"):
            chain.Note.parse(text)

    def test_later_extensions_are_read_over(self):
        """
        Further lines of a newer version are signed, and no obstacle.
        """
        said = self.checkpoint()
        signer = chain.ed25519_signer("shop", SEED)
        body = said.body() + "witnessed 1\n"
        signature = b64encode(signer.key_hash + signer.sign(body.encode())).decode()
        note = chain.Note.parse(f"{body}\n\N{EM DASH} shop {signature}\n")

        assert said == note.checkpoint
        assert note.verdict([chain.ed25519_verifier(signer.vkey)]) == "good"


class TestKeys:
    def test_pem(self):
        """
        A PKCS#8 PEM and the base64 of its seed are the same key.
        """
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519

        key = ed25519.Ed25519PrivateKey.from_private_bytes(b64decode(SEED))
        pem = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ).decode()

        assert (
            chain.ed25519_signer("shop", SEED).vkey
            == chain.ed25519_signer("shop", pem).vkey
        )

    def test_key_names_have_neither_space_nor_plus(self):
        """
        The name of a vkey ends at its first plus sign.
        """
        signer = chain.ed25519_signer("my shop+1", SEED)

        assert signer.vkey.startswith("my%20shop%2B1+")
        assert chain.ed25519_verifier(signer.vkey).key_hash == signer.key_hash

    @pytest.mark.parametrize(
        "secret",
        ["", "x", "AAAA", "-----BEGIN PRIVATE KEY-----\nx\n-----END PRIVATE KEY-----"],
    )
    def test_bad_secrets_are_not_repeated(self, secret):
        """
        The message tells the cure and not the secret.
        """
        with pytest.raises(ValueError, match="fasten keygen") as caught:
            chain.ed25519_signer("shop", secret)

        assert len(secret) < 2 or secret not in str(caught.value)

    @pytest.mark.parametrize("vkey", ["", "shop", "a+b", "shop+00000000+AAAA", "a+b+c"])
    def test_bad_vkeys(self, vkey):
        """
        The message shows what was given: a vkey is public.
        """
        with pytest.raises(ValueError, match="is no Ed25519 vkey"):
            chain.ed25519_verifier(vkey)

    def test_a_vkey_with_a_wrong_hash(self):
        """
        A mistyped key is caught before it is used.
        """
        vkey = chain.ed25519_signer("shop", SEED).vkey
        with pytest.raises(ValueError, match="is no Ed25519 vkey"):
            chain.ed25519_verifier(vkey.replace("shop", "shup", 1))

    def test_no_secret_in_a_repr(self):
        """
        A signer may be logged.
        """
        assert SEED not in repr(chain.ed25519_signer("shop", SEED))

    def test_without_cryptography(self, monkeypatch):
        """
        The missing extra is named with its pip line.
        """
        real = builtins.__import__

        def refuse(name: str, *rest: Any) -> Any:
            if name.startswith("cryptography"):
                raise ImportError(name)
            return real(name, *rest)

        monkeypatch.setattr(builtins, "__import__", refuse)
        with pytest.raises(MissingExtra, match=r"pip install 'fasten\[seal\]'"):
            chain.ed25519_signer("shop", SEED)


class TestSplitNotes:
    NOTES = tuple(
        chain.Checkpoint(key=("shop", "n1", c), size=1, root=bytes(32), seq=1).sign(
            [chain.ed25519_signer("shop", SEED)] * n
        )
        for n, c in enumerate(("short", "medium", "long"), 1)
    )

    @pytest.mark.parametrize("between", ["", "\n", "\n\n"])
    def test_one_after_the_other(self, between):
        """
        What `fasten checkpoint -o FILE` wrote, with or without blank lines between.
        """
        assert list(self.NOTES) == chain.split_notes(between.join(self.NOTES))

    def test_without_the_last_newline(self):
        """
        An editor that cuts the end of a file does no harm.
        """
        text = "".join(self.NOTES)[:-1]

        assert list(self.NOTES) == chain.split_notes(text)

    def test_from_the_log(self):
        """
        The lines that a service printed are found among its others.
        """
        lines = ['{"shape":"audit"}', "{broken"]
        lines += [json.dumps({"shape": "checkpoint", "note": n}) for n in self.NOTES]

        assert list(self.NOTES) == chain.split_notes("\n".join(lines))

    def test_nothing(self):
        """
        An empty file holds no notes.
        """
        assert [] == chain.split_notes("\n")


def test_forms_file_is_what_the_wheel_of_another_language_reads():
    """
    The published data is plain JSON with one object at its top.
    """
    path = Path(ROOT / "conformance" / "forms.json")

    assert {"about", "forms", "rows", "erasure", "frontiers", "checkpoint"} == set(
        json.loads(path.read_bytes())
    )
