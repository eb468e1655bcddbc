"""``python -m tests.attack``: mutated files, messages and archives for a time or a number, and what became of them.

Exit status 1 where a case was answered by an error of no type of ours, crashed, hung or filled memory; each of these is
printed with its seed.
"""

from __future__ import annotations

import argparse
import sys

from tests.attack.arena import OUTCOMES, TURNS, attack


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.attack", description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--cases", type=int, help="so many, whatever the time")
    parser.add_argument("--case", type=int, help="this one alone, in this process, with its traceback")
    given = parser.parse_args()
    if given.case is not None:
        from tests.attack import cases

        cases.run(TURNS[given.case % len(TURNS)], given.seed, given.case)
        return 0
    found, lines = attack(given.seed, cases=given.cases, seconds=given.seconds)
    print(f"{'':8}" + "".join(f"{outcome:>9}" for outcome in OUTCOMES))
    for kind in sorted(set(TURNS)):
        print(f"{kind:8}" + "".join(f"{found[kind, outcome]:9}" for outcome in OUTCOMES))
    for line in lines[:50]:
        print(line)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
