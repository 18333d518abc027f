"""Run the benchmarks, print their tables and write results/<name>.json.

    python benchmarks/run.py                              all of them
    python benchmarks/run.py neighborhood_interpolation   one
    python benchmarks/run.py --quick                      smaller batches and fewer repeats

Each benchmark is a file beside this one with `run(quick: bool) -> Benchmark`.
"""

import argparse
import importlib
from pathlib import Path

from harness import machine, save

NOT_BENCHMARKS = {"harness", "rivals", "run"}


def main() -> None:
    here = Path(__file__).parent
    names = sorted(path.stem for path in here.glob("*.py") if path.stem not in NOT_BENCHMARKS)
    parser = argparse.ArgumentParser(description="Run the benchmarks of otad.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which to run (all): {', '.join(names)}")
    parser.add_argument("--quick", action="store_true", help="smaller batches and fewer repeats; no results written")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.names) - set(names))
    if unknown:
        parser.error(f"no benchmark called {', '.join(unknown)}; there are: {', '.join(names)}")

    print("  ".join(f"{key}: {value}" for key, value in machine().items()), flush=True)
    for name in arguments.names or names:
        print(f"\n== {name} ==", flush=True)
        benchmark = importlib.import_module(name).run(quick=arguments.quick)
        print(benchmark, flush=True)
        if not arguments.quick:  # a quick run must not replace measured figures
            print(f"\nwritten: {save(benchmark).relative_to(here.parent)}")


if __name__ == "__main__":
    main()
