"""What can be known to be wrong before a run: settings, data, model, environment, nodes."""
