"""Every distinct rank of a layout built without memory, and what it would hold, save and send checked against the whole model."""
