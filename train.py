#!/usr/bin/env python3
"""`python train.py …`: the same program that the installed command `train.py` runs."""

from mlx_ring.train import main

if __name__ == "__main__":
    main()
