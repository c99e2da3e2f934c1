"""Arithmetic of a layout that trainer, packer and planner share."""
