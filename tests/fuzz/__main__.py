"""``python -m tests.fuzz [PARSER...] -n 100000 --seed S --json FILE``; exit status 1 when something crashed or hung."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from tests.fuzz import harness


def main() -> int:
    if sys.argv[1:2] == ["--worker"]:
        name, *numbers, progress, result = sys.argv[2:]
        seed, fixed, first, end = map(int, numbers)
        harness.worker(name, seed, fixed, first, end, Path(progress), Path(result))
        return 0
    parser = argparse.ArgumentParser("python -m tests.fuzz", description="Feed parsers with damaged and hostile input.")
    parser.add_argument("parsers", nargs="*", metavar="PARSER", help=f"default: all ({', '.join(harness.names())})")
    parser.add_argument("-n", type=int, default=10_000, help="inputs a parser, its seeds included (default 10000)")
    parser.add_argument("--no-monsters", action="store_true", help="without the inputs that take seconds")
    parser.add_argument("--seed", type=int, default=0, help="which mutants (default 0)")
    parser.add_argument("--json", metavar="FILE", help="write the table as JSON")
    parser.add_argument("--save", metavar="DIR", type=Path, help="keep failing inputs here, with what they did")
    parser.add_argument("--replay", metavar="FILE", type=Path, help="feed one file to the one PARSER, in this process")
    arguments = parser.parse_args()
    chosen = arguments.parsers or harness.names()
    if unknown := sorted(set(chosen) - set(harness.names())):
        parser.error(f"there is no parser {unknown[0]!r}; known: {', '.join(harness.names())}")
    if arguments.replay is not None:
        if len(chosen) != 1:
            parser.error("--replay wants one PARSER")
        return replay(chosen[0], arguments.replay)
    if harness.resource is None:
        print("no resource module here: memory is not limited", file=sys.stderr)
    tallies = []
    for name in chosen:
        started = time.perf_counter()
        tally = harness.run(name, arguments.n, arguments.seed, arguments.save, monsters=not arguments.no_monsters)
        tallies.append(tally)
        print(
            f"{name}: {tally.inputs} inputs, {tally.crashes} crashes, {tally.hangs} hangs,"
            f" {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True,
        )  # fmt: skip
        for failure in tally.failures[:3]:
            print(f"  {failure.kind} of input {failure.index}: {failure.what.strip()[-600:]}", file=sys.stderr)
    print(harness.table(tallies))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps([asdict(tally) for tally in tallies], indent=1) + "\n")
    return int(any(tally.failures for tally in tallies))


def replay(name: str, file: Path) -> int:
    import tempfile

    data = file.read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        outcome, what, seconds = harness.feed(harness.load(name), data, Path(folder), harness.STUCK)
    print(f"{outcome} in {seconds:.3f} s\n{what}")
    return int(outcome in ("crash", "hang"))


if __name__ == "__main__":
    sys.exit(main())
