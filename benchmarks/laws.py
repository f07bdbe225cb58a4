"""How probably would a wrong built-in pass have stood its trial? The law of each, on random integers.

    python -m benchmarks.laws [INSTANCES]

prints the table of `benchmarks/laws.md`. It takes about a minute.
"""

from __future__ import annotations

import sys

from rgc.cli_output import LAW_COLUMNS, law_row
from rgc.laws import prove
from rgc.passes import ALL, OPT_IN


def main() -> None:
    """Print one row for each pass as soon as it is proved."""
    instances = int(sys.argv[1]) if len(sys.argv) > 1 else 8
    print(f"| {' | '.join(LAW_COLUMNS)} |\n| --- |{' ---: |' * (len(LAW_COLUMNS) - 1)}")
    for each in (*ALL, *OPT_IN):
        print(f"| {' | '.join(law_row(prove(each, instances=instances)))} |", flush=True)


if __name__ == "__main__":
    main()
