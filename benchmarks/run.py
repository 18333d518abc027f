"""Run the benchmarks, print their tables and write results/<name>.json.

    python benchmarks/run.py                              all of them
    python benchmarks/run.py neighborhood_interpolation   one
    python benchmarks/run.py --quick                      smaller batches and fewer repeats
    python benchmarks/run.py --device cuda                those that a GPU can run, on one

Each benchmark is a file beside this one with `run(quick: bool) -> Benchmark`; where it can run on a GPU it has DEVICES
and takes `device` too, and its results go to results/<name>_cuda.json.
"""

import argparse
import importlib
import os
from pathlib import Path

# Before PyTorch is loaded: large arrays in pages of 2 MiB (Linux), or page faults are most of what new gradients cost.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import torch
from harness import machine, save

NOT_BENCHMARKS = {"harness", "rivals", "run"}


def main() -> None:
    here = Path(__file__).parent
    names = sorted(path.stem for path in here.glob("*.py") if path.stem not in NOT_BENCHMARKS)
    parser = argparse.ArgumentParser(description="Run the benchmarks of otad.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which to run (all): {', '.join(names)}")
    parser.add_argument("--quick", action="store_true", help="smaller batches and fewer repeats; no results written")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.names) - set(names))
    if unknown:
        parser.error(f"no benchmark called {', '.join(unknown)}; there are: {', '.join(names)}")

    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("skipped: --device cuda, and PyTorch finds no GPU here")
        return
    print("  ".join(f"{key}: {value}" for key, value in machine().items()), flush=True)
    for name in arguments.names or names:
        print(f"\n== {name} ==", flush=True)
        module = importlib.import_module(name)
        if arguments.device not in getattr(module, "DEVICES", ("cpu",)):
            print(f"skipped: it does not run on {arguments.device}")
            continue
        device = {"device": arguments.device} if arguments.device != "cpu" else {}
        benchmark = module.run(quick=arguments.quick, **device)
        print(benchmark, flush=True)
        if not arguments.quick:  # a quick run must not replace measured figures
            print(f"\nwritten: {save(benchmark).relative_to(here.parent)}")


if __name__ == "__main__":
    main()
