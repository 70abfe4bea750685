"""`python -m benchmarks [NAME...] [OPTION...]`: all benchmarks, or some, one after the other; then all targets."""

import json
import subprocess
import sys
import time

from benchmarks.approaches import ROOT
from benchmarks.report import table
from benchmarks.run import RESULTS

NAMES = (
    "noop",
    "latency",
    "batching",
    "waiting",
    "mixed",
    "growth",
    "scaling",
    "warm",
    "photos",
    "arrays",
    "data",
    "gpu",
)


def main() -> int:
    """The number of benchmarks that failed; a missed target is no failure."""
    names = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    options = [argument for argument in sys.argv[1:] if argument.startswith("-")]
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        print(f"no benchmark is called {', '.join(unknown)}; there are {', '.join(NAMES)}", file=sys.stderr)
        return 2
    failed = []
    began = time.time()
    for name in names or NAMES:
        print(f"\n=== {name} ===", flush=True)
        if subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *options], cwd=ROOT).returncode:
            failed.append(name)
    print("\n" + verdicts(began))
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return len(failed)


def verdicts(since: float) -> str:
    """All targets of the results that were written since then."""
    rows = []
    for name in NAMES:
        for path in (RESULTS / f"{name}.json", RESULTS / f"{name}-quick.json"):
            if path.exists() and path.stat().st_mtime >= since:
                rows += [_row(name, target) for target in json.loads(path.read_text())["targets"]]
    return table(["benchmark", "target", "asked", "measured", ""], rows) if rows else ""


def _row(name: str, target: dict) -> list[str]:
    asked = f"{'<=' if target['at_most'] else '>='} {target['limit']:g} {target['unit']}"
    measured = f"{target['measured'][0]:.3g}" if target["measured"] else "-"
    return [name, target["what"], asked, measured, target["verdict"].upper()]


if __name__ == "__main__":
    sys.exit(main())
