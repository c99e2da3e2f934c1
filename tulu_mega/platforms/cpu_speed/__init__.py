"""Parts that only make CPUs faster, each with its measured saving. No part concerns a GPU.

``TULU_MEGA_PLAIN=1`` in the environment turns all of it off, and the two parts of :mod:`tulu_mega.process` as well: layers are
megatron-core's own then, products and norms torch's. Results are the same but for the rounding of products and norms, which are
computed in another order. tests/platforms/test_plain.py holds them beside each other.
"""
