"""Guards of a run: against hangs, slow ranks, spikes of loss or gradient, skipped updates; and the signal to stop."""
