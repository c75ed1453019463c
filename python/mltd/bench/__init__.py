"""How fast and how large: cases, each behind its correctness gate, timed side by side and kept as CSV and pictures.

cases.py         what a case is: contenders that do the same job, a gate, a baseline
contenders.py    the layers that compete: nn.Linear, TarpLinear, unfused PyTorch, PEFT's LoRA
layers.py        one layer, forward and backward, many rows and few
unfused_cell.py  the search cell in plain PyTorch
cells.py         one search cell, masked, beside all six operations
models.py        a whole language model; inner steps of a meta-batch
cell_models.py   the same with search cells
inner_loop.py    the inner loop as a whole: mltd, plain batching, and what a reader of the paper would write
memory.py        peak memory of the layers
inner_memory.py  peak memory of the inner loop, and what each task adds
table.py         rows, CSV, goals, printed tables
"""
