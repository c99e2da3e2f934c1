"""What notices that a run goes wrong: hangs, slow ranks, leaps of loss or gradient, a request to end."""
