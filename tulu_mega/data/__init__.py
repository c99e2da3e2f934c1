"""From files to packed micro-batches.

`sources` reads rows and `mixing` draws from them. `chat` and `encoding` turn rows into tokens and labels, with the tokenizer that
`tokenizer` loads. `store` keeps tokens on disk. For each step `loader` has `packing` choose a micro-batch for every sequence and
`batch` lay the micro-batch out. `inspect` shows all of it, `mix` writes the drawn rows, `decontamination` finds evaluations in
them.
"""
