"""Faults on purpose: kills, failing disks, damaged inputs, records and checkpoints, two processes at once.

Every trial runs `bitladder` in a fork of one process that has imported everything (`server`), in a small world of its
own (`world`) full of files that it must not touch, and ends in one word (`verdict`). `python -m faults` tries all and
writes the figures; `tests/test_faults.py` tries a fixed sample.
"""
