#!/usr/bin/env python3
"""`python train.py …`: the same program that the installed command `train.py` runs."""

import sys

if not sys.flags.safe_path:  # a file in this folder, such as random.py, must not stand in for Python's own
    folder = sys.path.pop(0)
    installed = [place for place, path in enumerate(sys.path) if path.endswith("-packages")]
    sys.path.insert(installed[0] if installed else len(sys.path), folder)

from mlx_ring.train import main

if __name__ == "__main__":
    main()
