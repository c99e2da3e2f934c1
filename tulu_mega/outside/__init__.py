"""What others wrote or installed: JSON that may be anything, releases that may be any. Loads without torch."""
