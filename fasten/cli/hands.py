# SPDX-License-Identifier: Apache-2.0
"""
What the commands that change a store share: whose hands it is in, and where it is.
"""

from __future__ import annotations

import getpass
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from fasten.cli.command import WrongUsage, read_settings
from fasten.cli.verify import audit_dsn
from fasten.custody import Custody
from fasten.records import Author

__all__ = ["dsn_option", "opened", "operator"]


def dsn_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """
    Add `--dsn`.
    """
    return click.option(
        "--dsn", metavar="DSN", help="Use this store, not that of FASTEN_AUDIT_DSN."
    )(command)


def operator() -> Author:
    """
    Return who stands in the records of what is done here.
    """
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # a user without a name, as in some containers
        name = f"uid {os.getuid()}"
    return Author(actor=name, actor_kind="admin", method="cli")


@contextmanager
def opened(dsn: str | None, *, is_of_service: bool = True) -> Iterator[Custody]:
    """
    Open the audit store that is meant, for who is logged in.

    Raises:
        WrongUsage: there is none, or nothing says which service this is.
    """
    settings = read_settings(with_key=True)
    names = ("FASTEN_SERVICE_ID", "FASTEN_SERVICE_ID_FILE")
    if is_of_service and not any(os.environ.get(name) for name in names):
        raise WrongUsage(
            "FASTEN_SERVICE_ID is not set: chains, keys and periods are a service's; "
            "set it, or give --env-file"
        )
    place = audit_dsn(dsn, settings)
    with Custody(settings, dsn=place, author=operator()).opened() as custody:
        yield custody
