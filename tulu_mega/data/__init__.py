"""From files to packed micro-batches.

`sources` reads rows, of which `mixing` draws some; `chat` and `encoding` make tokens and labels of them, with what `tokenizer`
loads; `store` keeps these on disk; `packing` decides which sequence goes where, `batch` lays them out, and `loader` does both for
each step. `inspect` shows all of it, `mix` writes the drawn rows, `decontamination` finds evaluations in them.
"""
