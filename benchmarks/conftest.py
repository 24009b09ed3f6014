"""Two threads, as everywhere in this project."""

import os

import torch

torch.set_num_threads(min(int(os.environ.get("OMP_NUM_THREADS", "2")), 2))
