"""What kills ranks at told moments: its directory goes on PYTHONPATH."""
