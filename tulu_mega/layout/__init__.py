"""Arithmetic of a layout that trainer, packer and planner share, without torch."""
