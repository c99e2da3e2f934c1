"""What a run depends on, pinned by its content: recorded at the first start, compared at every later one."""
