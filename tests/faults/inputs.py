# SPDX-License-Identifier: Apache-2.0
"""
Hostile input, and secrets where they may stand: what of it gets through, or out.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch
from urllib.parse import urlsplit

import attrs

from fasten.codes import Registry
from tests.brokers import HOSTILE_IDS, is_minted
from tests.checker import rows_of
from tests.cli_runs import run
from tests.faults import server, trial
from tests.faults.grounds import Grounds, both
from tests.faults.oracle import Outcome, judge, select
from tests.faults.stage import Service, Stage, staged
from tests.faults.victim import Victim
from tests.outside import ROOT, wait_until

__all__ = ["CODES_FILES", "DETAILS", "EXPERIMENTS", "details", "files", "ids"]

CANARY: Final = "c4n4ry-of-a-caller"
"""What a caller's secret holds; the operator's have that of `trial`."""

MOST_S: Final = 1.0
"""How long an emit of a hostile detail may take: it is bounded, whatever it holds."""

MAX_DETAIL: Final = 65_536

_CORPUS: Final = json.loads(
    (ROOT / "tests/conformance/redact-corpus.json").read_text(encoding="utf-8")
)["cases"]


# --- details -------------------------------------------------------------------------


class _Mined:
    """
    An object that raises wherever it is touched.
    """

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(CANARY)

    def _explode(self, *_: object) -> Any:
        raise RuntimeError(CANARY)

    __repr__ = __str__ = __iter__ = __len__ = __bool__ = _explode


def _cyclic() -> Any:
    cycle: dict[str, Any] = {"a": [1]}
    cycle["a"].append(cycle)
    return cycle


def _deep() -> Any:
    value: Any = CANARY and 1
    for _ in range(10_000):
        value = {"a": [value]}
    return value


def _changing() -> Any:
    """
    Return a dict that a thread changes as long as it is held.
    """
    shared: dict[str, Any] = {f"k{n}": {"n": n} for n in range(500)}

    def change() -> None:
        for number in range(20_000):
            shared[f"x{number % 700}"] = [number]
            shared.pop(f"x{(number + 350) % 700}", None)

    threading.Thread(target=change, daemon=True).start()
    return shared


def _secrets() -> Any:
    return {
        "password": CANARY,
        "headers": [{"Authorization": f"Bearer {CANARY}"}, {"Set-Cookie": CANARY}],
        "database": f"postgres://shop:{CANARY}@db/shop",
        "API-Key": CANARY.encode(),
        "deep": {"client_secret": {"value": [CANARY]}},
        CANARY.replace(CANARY, "access_token"): CANARY,
    }


DETAILS: Final[dict[str, Callable[[], Any]]] = {
    "cyclic": _cyclic,
    "10,000 deep": _deep,
    "100 MB of text": lambda: {"text": "x" * 100_000_000},
    "100 MB of bytes": lambda: {"bytes": b"\xff" * 100_000_000},
    "a million items": lambda: {"items": list(range(1_000_000))},
    "a million keys": lambda: {f"k{n}": n for n in range(1_000_000)},
    "no end": lambda: {"numbers": count()},
    "NaN": lambda: {"nan": math.nan, "inf": [math.inf, -math.inf], "big": 10**400},
    "bytes": lambda: {
        "text": b"\0\xff\xfe",
        b"key": bytearray(b"x"),
        "v": memoryview(b"y"),
    },
    "raising": lambda: {"object": _Mined(), "list": [_Mined()]},
    "raising as a whole": _Mined,
    "changing": _changing,
    "surrogates": lambda: {"text": "\ud800\0\u202e\x1b[2J\r\n", "\udfff": "\uffff"},
    "secrets": _secrets,
    "no object": lambda: [CANARY and 1, None],
    "a class": lambda: {"class": type("x" * 10_000, (), {})},
}
"""Details that a caller may hand over by mistake, or an attacker on purpose."""


def _emit_all(name: str, acks: int, times: int) -> None:
    import fasten

    numbers = count()
    for _ in range(times):
        for make in DETAILS.values():
            detail, target = make(), f"{name}/main/{next(numbers)}"
            start = time.thread_time_ns()
            id_ = fasten.emit("CONFIG_UPDATED", target, detail=detail)
            ns = time.thread_time_ns() - start
            os.write(acks, f"{id_} {target} {ns}\n".encode())


def _emit_corpus(name: str, acks: int) -> None:
    import fasten

    for number, case in enumerate(_CORPUS):
        target = f"{name}/corpus/{number}"
        id_ = fasten.emit("CONFIG_UPDATED", target, detail=case["input"])
        os.write(acks, f"{id_} {target} 0\n".encode())


def _hostile_caller(stage_acks: str, name: str, times: int) -> None:
    acks = os.open(stage_acks, os.O_WRONLY | os.O_APPEND)
    _emit_all(name, acks, times)
    _emit_corpus(name, acks)


def details(grounds: Grounds, *, store: str, trials: int = 10) -> Outcome:
    """
    Emit each detail of DETAILS, and the corpus of redaction, *trials* times over, from
    services that are killed: rows are whole, bounded, and as the corpus says.
    """
    start = time.monotonic()
    with staged(grounds, store) as stage:
        stage.clear()
        for trial in range(trials):
            service = Service(stage, f"v{trial}")
            service.do(
                "call", partial(_hostile_caller, str(stage.acks), f"v{trial}", 1)
            )
            leaks = _search(stage.spool, CANARY)
            service.kill()
        stage.inherit()
        acks = stage.acked()
        slowest = max(ack.ns for ack in acks) / 1000
        wrong = [*leaks, *_faults_of_details(stage)]
        if slowest > 1_000_000 * MOST_S:
            wrong.append(f"an emit took {slowest:.0f} us")
        found = judge(
            f"hostile details ({store})", stage.dsn, acks, trials=trials, wrong=wrong
        )
    found = attrs.evolve(found, max_us=round(slowest, 1))
    return found.lasting(time.monotonic() - start)


def _faults_of_details(stage: Stage) -> Iterator[str]:
    for row in rows_of(stage.dsn):
        _, _, place = row["target"].partition("/")
        kind, _, number = place.partition("/")
        text = row["detail"] or "{}"
        if CANARY in json.dumps(row, default=str):
            yield f"a caller's secret stands in a row: {row['target']}"
        if len(text.encode()) > MAX_DETAIL or not isinstance(json.loads(text), dict):
            yield f"{row['target']}: a detail of {len(text)} characters"
        if kind == "corpus" and json.loads(text) != _CORPUS[int(number)]["expected"]:
            yield f"{_CORPUS[int(number)]['name']}: {text}"


def _search(folder: Path, *secrets: str) -> list[str]:
    """
    Say in which files of a folder a secret stands.
    """
    return [
        f"a secret stands in {path.name}"
        for path in folder.iterdir()
        if path.is_file()
        for secret in secrets
        if secret.encode() in path.read_bytes()
    ]


# --- ids and anchors -----------------------------------------------------------------

_TEXTS: Final = [
    *(text.decode("utf-8", "surrogateescape") for text in HOSTILE_IDS),
    *("\ud800", "a" * 1_000_000, "x" * 65 + ",x" * 65, "é\xe9", "\u2066\u202e"),
    *("scheduler-1\r\nX: y", "'; DROP TABLE audit_log; --", "%s%n{0}", "\x00"),
]


def _emit_texts(stage_acks: str, name: str) -> None:
    import fasten

    acks = os.open(stage_acks, os.O_WRONLY | os.O_APPEND)
    for number, text in enumerate(_TEXTS):
        name_ = text or "x"  # no name at all is the caller's mistake
        anchors = {"actor": name_, "client": name_, "on_behalf_of": name_}
        with fasten.bind(text, trace_id=text, span_id=text, **anchors):
            target = f"{name}/ids/{number}"
            id_ = fasten.emit("USER_CREATED", target, reason=name_)
            os.write(acks, f"{id_} {target} 0\n".encode())


def ids(grounds: Grounds, *, store: str, trials: int = 10) -> Outcome:
    """
    Bind hostile texts as request id, trace id and anchors: no text becomes an id, and
    rows are stored as they were sealed.
    """
    start = time.monotonic()
    with staged(grounds, store) as stage:
        stage.clear()
        for trial in range(trials):
            service = Service(stage, f"v{trial}")
            service.do("call", partial(_emit_texts, str(stage.acks), f"v{trial}"))
            service.kill()
        stage.inherit()
        wrong = [
            f"{row['request_id'][:60]!r} became an id"
            for row in rows_of(stage.dsn)
            if row["domain"] != "fasten" and not is_minted(row["request_id"])
        ]
        found = judge(
            f"hostile ids ({store})",
            stage.dsn,
            stage.acked(),
            trials=trials,
            wrong=wrong,
        )
    return found.lasting(time.monotonic() - start)


# --- files of codes ------------------------------------------------------------------

_TOUCHED: Final = "touched-by-a-codes-file"


def _bomb() -> str:
    ten = [", ".join([f"*a{n}"] * 10) for n in range(11)]
    lines = [f"a{n}: &a{n} [{items}]" for n, items in enumerate(ten, start=1)]
    return "\n".join(
        ["a0: &a0 [x]", *lines, "domain: x", "codes: {A_B: {description: *a11}}"]
    )


CODES_FILES: Final[dict[str, Callable[[], str | bytes]]] = {
    "a call": lambda: f"!!python/object/apply:os.system ['touch {_TOUCHED}']",
    "a call inside": lambda: (
        "domain: x\ncodes:\n  A_B:\n    description: "
        f"!!python/object/apply:os.system ['touch {_TOUCHED}']"
    ),
    "a bomb": _bomb,
    "a bomb of codes": lambda: _bomb().replace("description: *a11", "*a11"),
    "a cycle": lambda: "domain: x\ncodes: &c\n  A_B: *c",
    "a cyclic list": lambda: "&a [*a]",
    "10,000 deep": lambda: "codes: " + "[" * 10_000,
    "10,000 maps deep": lambda: "{a: " * 10_000,
    "twice": lambda: "domain: x\ncodes: {A_B: {}, A_B: {severity: warn}}",
    "NUL": lambda: b"domain: x\0\ncodes: {}",
    "no text": lambda: b"\xff\xfe\x00\xd8" * 100,
    "a list": lambda: "- 1\n- 2",
    "numbers for names": lambda: "domain: x\ncodes: {1: {}, null: {}, 2026-01-01: {}}",
    "a set": lambda: "domain: x\ncodes: !!set {A_B}",
    "lower case": lambda: "domain: x\ncodes: {a_b: {}}",
    "fasten's own": lambda: "domain: fasten\ncodes: {AUDIT_READ: {}}",
    "a huge number": lambda: (
        "domain: x\ncodes: {A_B: {severity: " + "9" * 100_000 + "}}"
    ),
    "ANSI": lambda: 'domain: "\\e[2J\\r\\n"\ncodes: {A_B: {}}',
    "tabs": lambda: "domain: x\ncodes:\n\tA_B: {}",
    "two documents": lambda: "domain: x\n---\ndomain: y",
    "many": lambda: (
        "domain: x\ncodes:\n" + "".join(f"  a{n}: {{}}\n" for n in range(500))
    ),
}
"""Files of codes with mistakes in them, or worse."""

_FILES_S: Final = 60.0
"""How long all of them together may take."""


def files(grounds: Grounds, *, trials: int = 1) -> Outcome:
    """
    Have a process read each of CODES_FILES: all are refused, by an error of fasten's
    that is short, and nothing that stands in them is run.
    """
    paths = []
    for number, make in enumerate(CODES_FILES.values()):
        path, given = grounds.folder / f"{number}.codes.yaml", make()
        path.write_bytes(given if isinstance(given, bytes) else given.encode())
        paths.append(str(path))
    start = time.monotonic()
    wrong, hangs = [], 0
    for _ in range(trials):
        told, is_done = _read_all(paths, grounds.folder)
        hangs += not is_done
        for name, said in zip(CODES_FILES, told, strict=False):
            if said != "refused":
                wrong.append(f"{name}: {said}")
    if (grounds.folder / _TOUCHED).exists():
        wrong.append("a codes file was run")
    count_ = trials * len(paths)
    found = Outcome(
        name="hostile codes", trials=count_, hangs=hangs, faults=tuple(wrong)
    )
    return found.lasting(time.monotonic() - start)


def _read_all(paths: Sequence[str], folder: Path) -> tuple[list[str], bool]:
    given = [sys.executable, "-m", __name__, *paths]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    with (folder / "told").open("w+") as told:
        is_done = True
        try:
            subprocess.run(
                given,
                cwd=folder,
                env=environ,
                stdout=told,
                check=True,
                timeout=_FILES_S,
            )
        except subprocess.TimeoutExpired:
            is_done = False
        told.seek(0)
        return told.read().splitlines(), is_done


def _load(registry: Registry, path: str) -> str:
    import fasten

    try:
        registry.load(path)  # all or nothing
    except fasten.FastenError as error:
        text = str(error)
        is_fit = len(text) < 100_000 and text.replace("\n", "").isprintable()
        return "refused" if is_fit else f"refused by {text[:200]!r}"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:200]!r}"
    return "taken"


# --- secrets -------------------------------------------------------------------------

_SEED: Final = hashlib.sha256(b"a signing key of this test").digest()
KEYS: Final = {
    "reader_token": f"{trial.CANARY}-of-readers-0123456789",
    "signing_key": base64.b64encode(_SEED).decode(),
}
"""Secrets that an operator gives a service, beside the password in its DSN."""

_ERROR: Final = "Traceback (most recent call last)"
_OPERATORS: Final = (trial.CANARY, KEYS["signing_key"], _SEED.hex(), repr(_SEED)[2:-1])


def probe(folder: Path, name: str) -> None:
    """
    Have a thread of a victim hand over secrets, and write down what becomes of errors:
    tracebacks with the locals of each frame, and whatever tells of fasten's state.
    """
    import fasten

    fasten.codes.register(
        "probe", {"PROBED_NOW": fasten.codes.Meta(on_failure="raise")}
    )
    given = (folder / f"{name}.tracebacks", f"{name}/probe/0")
    threading.Thread(target=_probing, args=given, daemon=True).start()


def _probing(path: Path, target: str) -> None:
    import fasten

    with path.open("a") as told:
        while True:
            for act in (_emit_secrets, _emit_now, _ask, _state):
                try:
                    said = act(target)
                except fasten.NotInitialized:  # not yet, or not any more
                    said = ""
                    time.sleep(0.01)
                except Exception as error:
                    for one in _chain(error):
                        one.__suppress_context__ = False
                    shown = traceback.TracebackException.from_exception(
                        error, capture_locals=True
                    )
                    said = "".join(shown.format())
                    said += f"{error!r} {vars(error)}"
                told.write(f"{said}\n")
                told.flush()
            time.sleep(0.01)


def _emit_secrets(target: str) -> str:
    import fasten

    fasten.log.error("refused", **_secrets())
    fasten.record_api(path="/", method="GET", status=401, **_secrets())
    return fasten.emit("USER_CREATED", target, detail=_secrets())


def _emit_now(target: str) -> str:
    import fasten

    return fasten.emit("PROBED_NOW", target)


def _ask(target: str) -> str:
    import fasten

    return str(fasten.query(target=target, limit=1))


def _state(_: str) -> str:
    import fasten
    from fasten import engine

    running: Any = engine.default()
    parts = (running, running.settings, running.delivery, running.delivery.drainer)
    return f"{fasten.health()} {fasten.stats()} {parts}"


def secrets(
    grounds: Grounds,
    *,
    trials: int = 3,
    names: Sequence[str] = tuple(server.OPERATIONS),
) -> Outcome:
    """
    Give a service secrets in every place where one can stand, and have all of *names*
    in `server.OPERATIONS` happen to its store: no secret gets out anywhere.
    """
    with server.guarded(grounds.new_server()) as plain:
        dsn, admin = server.with_secret(plain, "shop"), _admin(plain)
        seen: list[str] = []

        def err(victim: Victim) -> Iterator[str]:
            for name in names:
                done = server.OPERATIONS[name](admin, plain)
                next(done)
                yield from trial.is_ill(victim, time.monotonic(), 10.0, "")
                _wait_for_errors(victim)
                seen.extend(_doctor(dsn, grounds.spool))
                next(done, None)
                yield from trial.is_well(victim, time.monotonic())
            yield from _leaks(victim, grounds.spool, plain, seen)

        return trial.endure(
            "secrets",
            grounds,
            plain,
            err,
            trials=trials,
            dsn=dsn,
            settings={
                **KEYS,
                "api_dsn": dsn,
                "sys_dsn": dsn,
                "checkpoint_interval": "1s",
            },
            setup="from tests.faults.inputs import probe; probe(folder, plan.name)",
        )


def _admin(dsn: str) -> str:
    return urlsplit(dsn)._replace(path="/postgres").geturl()


def _wait_for_errors(victim: Victim) -> None:
    """
    Wait until two of the victim's probes have met with errors.
    """
    goal = victim.tells("tracebacks").count(_ERROR) + 2
    wait_until(lambda: victim.tells("tracebacks").count(_ERROR) >= goal, 60)


def _doctor(dsn: str, spool: Path) -> Iterator[str]:
    environ = {
        "FASTEN_SERVICE_ID": "victim",
        "FASTEN_AUDIT_DSN": dsn,
        "FASTEN_READER_TOKEN": KEYS["reader_token"],
        "FASTEN_SIGNING_KEY": KEYS["signing_key"],
        "FASTEN_SPOOL_DIR": str(spool),
    }
    for words in (
        ["doctor"],
        ["doctor", "-o", "json"],
        ["tail"],
        ["verify"],
        ["drain"],
    ):
        done = run(*words, **environ)
        yield done.output
        if done.exc_info and not isinstance(done.exception, SystemExit):
            yield "".join(traceback.format_exception(*done.exc_info))


def _leaks(victim: Victim, spool: Path, dsn: str, seen: Sequence[str]) -> Iterator[str]:
    told = {"an operator's command": "\n".join(seen), "its store": _everything(dsn)}
    told |= {path.name: path.read_text(errors="replace") for path in victim.files()}
    told |= {
        path.name: path.read_bytes().decode(errors="replace")
        for path in spool.iterdir()
    }
    for place, text in told.items():
        for secret in _OPERATORS:
            if secret in text:
                yield f"an operator's secret stands in {place}: {_around(text, secret)}"
        if CANARY in text and not place.endswith(".tracebacks"):
            yield f"a caller's secret stands in {place}: {_around(text, CANARY)}"


def _around(text: str, secret: str) -> str:
    at = text.index(secret)
    return text[max(0, at - 300) : at + 60]


def _everything(dsn: str) -> str:
    """
    Return all that is in a database, as text.
    """
    named = "SELECT tablename AS name FROM pg_tables WHERE schemaname = 'public'"
    tables = [row["name"] for row in select(dsn, named)]
    return "\n".join(str(select(dsn, f"SELECT * FROM {table}")) for table in tables)


_C: Final = trial.CANARY
_CUT: Final = KEYS["signing_key"][:41]
MISTAKES: Final[tuple[Mapping[str, str], ...]] = (
    *(
        {"audit_dsn": f"postgres://u:{_C}@h{end}"}
        for end in (":badport/d", "/d d", "/d#x")
    ),
    *({"audit_dsn": f"{kind}://u:{_C}@h/d"} for kind in ("mysql", "", "postgres:")),
    *(
        {"audit_dsn": f"postgres://u:p@h/d?{_C}{end}"}
        for end in ("", "=1&x", "&table=1x")
    ),
    *({"audit_dsn": f"postgres://u:{odd}{_C}@h/d"} for odd in ("%zz", "a/", "?")),
    *({"audit_dsn": f"postgres://u:p@h/d?password={_C}&table=a-b"}, {"api_dsn": _C}),
    *({"outbox_dsn": f"postgres://u:{_C}@[::1/d"}, {"sys_dsn": f"sqlite:{_C}"}),
    *({"reader_token": f"{_C}{odd}"} for odd in (" x", "\u00e9")),
    *({"signing_key": f"{_C}{odd}"} for odd in ("", "==", " x", ",")),
    # One key in 64 begins with a slash.
    *({"signing_key": f"{start}{_CUT}"} for start in ("/", "///")),
    {"audit_dsn": f"postgres://u:{_C}@h/d", "queue_capacity": "x", "strict": "maybe"},
)
"""Settings with a secret and a mistake in them."""


def mistakes(_: Grounds, *, trials: int = 1) -> Outcome:
    """
    Start with each of MISTAKES, by keyword and by environment: the error names the
    variable, and neither it nor a frame's locals hold the secret.
    """
    environs = [{f"FASTEN_{k.upper()}": v for k, v in m.items()} for m in MISTAKES]
    wrong = [
        f"{given}: {found}"
        for given in (*MISTAKES, *environs) * trials
        for found in _mistaken(given)
    ]
    return Outcome(
        name="secrets in mistakes", trials=len(MISTAKES), faults=tuple(wrong)
    )


def _mistaken(given: Mapping[str, str]) -> Iterator[str]:
    error = _start(given)
    if error is None:
        yield "taken"
        return
    for one in _chain(error):
        if _holds_one(f"{one} {one!r} {one.args} {vars(one)}"):
            yield f"it stands in the error: {one}"
        for frame, _ in traceback.walk_tb(one.__traceback__):
            # Those of this file have it, of course, and so has what calls it.
            is_ours = frame.f_code.co_filename != __file__
            if is_ours and any(_holds_one(_repr(v)) for v in frame.f_locals.values()):
                yield f"it stands in the locals of {frame.f_code.co_name}"


def _start(given: Mapping[str, str]) -> BaseException | None:
    import fasten

    by_name = {k: v for k, v in given.items() if not k.startswith("FASTEN_")}
    environ = {k: v for k, v in given.items() if k.startswith("FASTEN_")}
    with patch.dict(os.environ, FASTEN_SERVICE_ID="s", **environ):
        try:
            fasten.init(**by_name)
        except fasten.SettingsError as error:
            return error
    fasten.close()
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """
    Return an error and what it came of, also where `from None` hides that.
    """
    while error is not None:
        yield error
        error = error.__context__


def _holds_one(text: str) -> bool:
    return _C in text or _CUT in text


def _repr(value: object) -> str:
    with suppress(Exception):
        return repr(value)
    return ""


EXPERIMENTS: Final = {
    **both("input-details", details),
    **both("input-ids", ids),
    "input-codes": files,
    "input-secrets": secrets,
    "input-mistakes": mistakes,
}
"""The experiments of this module."""


if __name__ == "__main__":
    known = Registry()
    for given in sys.argv[1:]:
        print(_load(known, given), flush=True)
