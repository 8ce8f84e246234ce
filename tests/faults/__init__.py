"""Bring about faults in a run: at a file operation, at a call, at a time. See README.md here."""
