# SPDX-License-Identifier: Apache-2.0
"""
One request through a fleet: five processes, five transports, one id, one command.

`make demo-fleet` runs this. An order comes in over HTTP; the service tells an oven by
MQTT and hands the picking to a Celery worker; the worker has an agent, a process of
its own, choose a carrier; and a cron job ships what lies ready. All write to one
Postgres, or to a SQLite file where there is none (FASTEN_AUDIT_DSN names a store of
yours). `python demo_fleet.py ROLE` is one of the five.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import fasten

ROOT = Path(__file__).resolve().parent.parent
HOST = "127.0.0.1"
ORDER = "ord-9001"


def port_of(name: str) -> int:
    """
    Return the port that the fleet was started with.
    """
    return int(os.environ[f"DEMO_{name}_PORT"])


def ready() -> None:
    """
    Tell whoever started this process that it can be worked with.
    """
    print("ready", flush=True)


# --- the HTTP service ---------------------------------------------------------------


def http() -> None:
    """
    Take orders.
    """
    import uvicorn
    from fastapi import FastAPI

    from fasten.shim.http import APILogger, RequestIDMiddleware
    from fasten.shim.mqtt import publish_sync

    fasten.init()
    device, tasks = mqtt_client(), celery()
    device.loop_start()
    app = FastAPI()
    app.add_middleware(APILogger)
    app.add_middleware(
        RequestIDMiddleware,
        actor=lambda scope: dict(scope["headers"])[b"x-user"].decode(),
    )

    @app.post("/orders/{order}")
    def place(order: str) -> dict[str, str | None]:
        fasten.emit("ORDER_PLACED", order, detail={"amount": 12.5})
        publish_sync(device, "ovens/7/setpoint", {"celsius": 220}, qos=1)
        tasks.send_task("pick", [order])
        fasten.log.info("order_taken", order=order)
        return {"request_id": fasten.current_request_id()}

    with socket.create_server((HOST, port_of("HTTP"))) as listener:
        ready()  # whoever connects now waits for the first accept
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        server.run(sockets=[listener])


# --- the device ---------------------------------------------------------------------


def mqtt_client() -> Any:
    """
    Connect to the broker, with MQTT 5.
    """
    import paho.mqtt.client as paho

    client = paho.Client(paho.CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
    client.connect(HOST, port_of("MQTT"))
    return client


def device() -> None:
    """
    Be an oven that listens to its setpoint.
    """
    from fasten.shim.mqtt import attach, handler

    @handler("ovens/+/setpoint")
    def on_setpoint(msg: Any, _: fasten.Context) -> None:
        wanted = json.loads(msg.payload)["celsius"]
        fasten.emit("DEVICE_SETPOINT_UPDATED", "oven-7", detail={"celsius": wanted})

    fasten.init()
    client = mqtt_client()
    attach(client)
    client.on_subscribe = lambda *_: ready()
    client.subscribe("ovens/+/setpoint", qos=1)
    client.loop_forever()


# --- the worker ---------------------------------------------------------------------


def celery() -> Any:
    """
    Make the Celery application, for the worker and for those that send to it.
    """
    from celery import Celery

    from fasten.shim.celery import install
    from fasten.shim.subprocess import env

    app = install(Celery("fleet", broker=f"redis://{HOST}:{port_of('REDIS')}/0"))
    app.conf.broker_connection_retry_on_startup = True
    app.conf.worker_redirect_stdouts = False

    @app.task(name="pick")
    def pick(order: str) -> None:
        fasten.emit("JOB_COMPLETED", f"pick {order}", actor="wms")
        asked = [sys.executable, __file__, "agent", order]
        told = env(os.environ | settings("agent", os.environ["FASTEN_AUDIT_DSN"]))
        carrier = subprocess.check_output(asked, env=told, text=True).strip()
        parcel = {"order": order, "carrier": carrier}
        # What outlives the request carries its id like any other value.
        parcel["request_id"] = fasten.current_request_id() or ""
        shelf().rpush("shelf", json.dumps(parcel))

    return app


def worker() -> None:
    """
    Work on tasks.
    """
    from celery.platforms import SecurityWarning
    from celery.signals import worker_ready

    warnings.simplefilter("ignore", SecurityWarning)  # a demo may run as root
    worker_ready.connect(lambda **_: ready(), weak=False)
    fasten.init()
    options = ["--pool", "solo", "--loglevel", "error", "--without-mingle"]
    celery().worker_main(["--quiet", "worker", *options])


def shelf() -> Any:
    """
    Connect to where parcels wait.
    """
    from redis import Redis

    return Redis(HOST, port_of("REDIS"), decode_responses=True)


# --- the agent ----------------------------------------------------------------------


def agent() -> None:
    """
    Choose a carrier for an order: a child process of the worker.
    """
    from fasten.shim.agent import tool
    from fasten.shim.subprocess import inherited

    fasten.init()
    with inherited(), tool("choose_carrier", actor="agent-7") as call:
        call.record(cost_usd=0.0042, tokens=812, model="small-1")
        print("bike")
    fasten.flush(30)  # this process ends at once: its row would wait for the next one


# --- the cron job -------------------------------------------------------------------


def cron() -> None:
    """
    Ship what lies ready, twice a second.
    """
    from apscheduler.schedulers.blocking import BlockingScheduler

    from fasten.shim.scheduler import instrument

    fasten.init()
    parcels = shelf()

    @instrument
    def ship() -> None:
        while text := parcels.lpop("shelf"):
            parcel = json.loads(text)
            with fasten.bind(parcel["request_id"]):
                detail = {"carrier": parcel["carrier"]}
                fasten.emit("BATCH_PROCESSED", f"ship {parcel['order']}", detail=detail)

    scheduler = BlockingScheduler()
    scheduler.add_job(ship, "interval", seconds=0.5)
    ready()
    scheduler.start()


# --- the fleet ----------------------------------------------------------------------

ROLES: dict[str, Callable[[], None]] = {
    "http": http,
    "device": device,
    "worker": worker,
    "cron": cron,
    "agent": agent,
}


@contextmanager
def brokers(folder: Path) -> Iterator[dict[str, str]]:
    """
    Run mosquitto and Redis, installed if need be; yield what the roles are told.
    """
    sys.path.insert(0, str(ROOT))
    from tests import brokers
    from tests.servers import free_port

    with brokers.mosquitto(folder) as mqtt, brokers.redis(folder) as redis:
        ports = {"MQTT": mqtt, "REDIS": redis, "HTTP": free_port()}
        yield {f"DEMO_{name}_PORT": str(port) for name, port in ports.items()}


@contextmanager
def store(folder: Path) -> Iterator[str]:
    """
    Yield the DSN of the one store: yours, a Postgres that ends with the demo, SQLite.
    """
    from tests.postgres import PostgresMissing, private_server

    if given := os.environ.get("FASTEN_AUDIT_DSN"):
        yield given
        return
    with ExitStack() as stack:
        try:
            yield stack.enter_context(private_server()).dsn()
        except PostgresMissing as missing:
            print(f"SQLite, for want of a Postgres: {missing}")
            yield f"sqlite:///{folder / 'audit.db'}"


def settings(role: str, dsn: str) -> dict[str, str]:
    """
    Return a role's environment: a service and a node of its own, one store for all.
    """
    return {
        "FASTEN_SERVICE_ID": f"fleet-{role}",
        "FASTEN_NODE_ID": f"{role}-01",
        **{f"FASTEN_{stream}_DSN": dsn for stream in ("AUDIT", "SYS", "API")},
        "FASTEN_STDOUT": "",
    }


def started(role: str, dsn: str) -> subprocess.Popen[str]:
    """
    Start one of the five.
    """
    command = [sys.executable, __file__, role]
    env = os.environ | settings(role, dsn)
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)


@contextmanager
def running(dsn: str) -> Iterator[None]:
    """
    Run those of the five that wait for work, until the end of the block.
    """
    roles = ("device", "worker", "cron", "http")
    processes = {role: started(role, dsn) for role in roles}
    try:
        for role, process in processes.items():
            line = process.stdout.readline() if process.stdout else ""
            if line != "ready\n":
                raise SystemExit(f"the {role} did not start: {line!r}")
            print(f"  {role:8}{'pid':>5} {process.pid}")
        yield
    finally:
        for process in processes.values():
            process.terminate()
        for process in processes.values():
            process.communicate(timeout=30)


def place_order() -> str:
    """
    Be a customer; return the id that the answer names.
    """
    url = f"http://{HOST}:{port_of('HTTP')}/orders/{ORDER}"
    print(f"\n$ curl -X POST -H 'X-User: ann' {url}")
    request = urllib.request.Request(url, method="POST", headers={"X-User": "ann"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=20) as answer:
        return str(json.load(answer)["request_id"])


def main() -> None:
    """
    Start the fleet, place one order, and print where it went.
    """
    print("a fleet on one machine:")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        os.environ |= stack.enter_context(brokers(folder))
        os.environ["XDG_STATE_HOME"] = str(folder)  # of the journals
        dsn = stack.enter_context(store(folder))
        os.environ |= settings("demo", dsn) | {"NO_COLOR": "1"}
        stack.enter_context(running(dsn))
        request_id = place_order()
        wait_for(request_id, dsn)
        print(f"\n$ fasten trace {request_id}", flush=True)
        command = [Path(sys.executable).with_name("fasten"), "trace", request_id]
        subprocess.run(command, check=True)


def wait_for(request_id: str, dsn: str) -> None:
    """
    Wait until each of the five has a row in the store, and the other streams are there.
    """
    from tests.outside import wait_until

    def rows(stream: str) -> list[Any]:
        try:
            return list(fasten.query(stream, dsn=dsn, request_id=request_id).rows)
        except fasten.AuditStoreError:  # its table is not there yet
            return []

    def arrived() -> bool:
        return all((len(rows("audit")) == len(ROLES), rows("sys"), rows("api")))

    wait_until(arrived, 60)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    ROLES[sys.argv[1]]() if sys.argv[1:] else main()
