"""Reports of runs: curves as PNG and one self-contained HTML page."""
