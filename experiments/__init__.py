"""Programs: python -m experiments.NAME --config=configs/NAME.py:VARIANT --workdir=runs/NAME"""

import os
import sys

if sys.platform == "linux" and sys.argv[0] == "-m" and sys.executable and "GLIBC_TUNABLES" not in os.environ:
    # XLA's CPU backend takes memory anew for every step. Kept for the next one, and in large pages, it is there sooner
    # (PERFORMANCE.md). The C library reads this where a process begins, so the command begins once more, before it has imported
    # anything.
    tunables = {"hugetlb": 1, "mmap_max": 0, "trim_threshold": 2**40, "arena_max": 1}
    os.environ["GLIBC_TUNABLES"] = ":".join(f"glibc.malloc.{name}={value}" for name, value in tunables.items())
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it would say at every start that there is no PyTorch
