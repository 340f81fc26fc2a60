# SPDX-License-Identifier: Apache-2.0
"""
Experiments that try to break a promise: a victim, a fault, and an oracle.

A *victim* process emits and writes each id to a pipe once `emit` has returned; the
*oracle* compares what was acknowledged with what a store holds. `make faults` runs
the long forms; the tests run the same functions with few trials.
"""
