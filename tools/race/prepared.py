"""Imported before the rest of this project by what bench_*.py times: megatron-core as a command's rank imports it."""

from tulu_mega.platforms import prepare_imports

prepare_imports()
