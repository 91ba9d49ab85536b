"""The command line: parse, build settings, call. One file per group of commands, heavy imports inside the commands."""

import gc

# Importing makes hundreds of thousands of objects, all of which stay; at Python's own threshold the cyclic collector looks at
# them a hundred times over (a fifth of the start of an API). A process that stays sets its own (kit/loop.py).
gc.set_threshold(100_000, 10, 10)
