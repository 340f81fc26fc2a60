# SPDX-License-Identifier: Apache-2.0
"""
The heir: the next process of the service, which delivers what the dead have left.

Run as a script it is one.
"""

from __future__ import annotations

import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from tests.outside import ROOT, wait_until

__all__ = ["inherit", "is_settled"]


def inherit(dsn: str, directory: Path | str, timeout: float = 120.0) -> None:
    """
    Start the next process of the service, and wait until it has delivered everything.

    Raises:
        RuntimeError: it failed, or something is left.
    """
    done = subprocess.run(
        [sys.executable, "-m", __name__, dsn, str(directory), str(timeout)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout + 30,
    )
    if done.returncode:
        raise RuntimeError(f"the heir failed:\n{done.stderr[-4000:]}")


def is_settled(directory: Path | str, own: str = "") -> bool:
    """
    Tell whether each journal but *own* is delivered, as its account says.
    """
    writers = {path.name.partition(".")[0] for path in Path(directory).glob("*.seg")}
    return all(
        (Path(directory) / f"{writer}.ack").read_bytes().endswith(b"done")
        for writer in writers - {own}
    )


def _inherit(dsn: str, directory: str, timeout: float) -> None:
    import fasten
    from tests.faults.victim import settings_of

    until = time.monotonic() + timeout
    while True:
        # Who was dying while one engine looked is found by the next.
        engine = fasten.init(**settings_of(dsn, directory))
        own = engine.delivery.spool.writer_id  # type: ignore[union-attr]
        try:
            wait_until(partial(is_settled, directory, own), 5)
        except (TimeoutError, OSError):
            if time.monotonic() > until:
                raise
            continue
        if not fasten.close(30):
            raise RuntimeError("the heir could not deliver its own rows")
        return


if __name__ == "__main__":
    _inherit(sys.argv[1], sys.argv[2], float(sys.argv[3]))
