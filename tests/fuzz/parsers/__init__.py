"""One file a parser; see ``tests.fuzz.harness.Parser``."""
