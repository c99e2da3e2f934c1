"""Process groups of a layout, and collectives in which all ranks fail together."""
