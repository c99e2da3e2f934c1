"""Stages, each readable as its method. `tulu_mega.platforms.prepare_imports` is called before one of them is imported."""
