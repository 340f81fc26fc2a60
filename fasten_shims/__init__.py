# SPDX-License-Identifier: Apache-2.0
"""
One request id across every wire: a module for each transport.

Users spell them `fasten.shim.http`, `fasten.shim.mqtt` and so on; the code is here.
A shim needs its framework only when it is used.
"""
