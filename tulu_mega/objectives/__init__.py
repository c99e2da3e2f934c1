"""Losses as sums over a micro-batch, a file each, and advantages: mathematics without process groups."""
