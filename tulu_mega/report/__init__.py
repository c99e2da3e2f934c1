"""What runs were like: curves as PNG and one self-contained HTML page."""
