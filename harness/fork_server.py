"""Fork server: what the process that all workers are forked from does first.

``multiprocessing`` imports this module there, and importing it is its whole effect.
"""

from __future__ import annotations

import os
import signal

from harness.heap import keep_freed_memory
from harness.processes import die_with_parent

die_with_parent()
keep_freed_memory()
signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends this one
for _descriptor in (1, 2):
    os.dup2(os.open(os.devnull, os.O_WRONLY), _descriptor)

# oneDNN keeps a kernel for each shape it has seen, and ideep, through which torch calls it, another, a
# thousand each unless told: some 50 MB with every model. One model has few shapes.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")
os.environ.setdefault("LRU_CACHE_CAPACITY", "8")

# torch.cuda.is_available() asks the CUDA runtime otherwise, which a fork does not survive.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
