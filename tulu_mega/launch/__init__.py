"""How ranks are started: this machine's own world, torchrun's agent, and a run directory's lock and names."""
