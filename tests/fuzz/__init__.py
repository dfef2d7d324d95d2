"""Fuzzing of everything that reads what somebody else wrote: ``python -m tests.fuzz --help``.

A parser is one file in ``tests/fuzz/parsers``; ``harness.Parser`` says what it holds. Nothing is registered.
"""
