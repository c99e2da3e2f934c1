"""From files to packed micro-batches.

`sources` reads rows; `chat` and `encoding` make tokens and labels of them, with what `tokenizer` loads; `store` keeps these on
disk; `packing` decides which sequence goes where, `batch` lays them out, and `loader` does both for each step.
"""
