"""The run folder: its names and states, the leases of its tasks, and reading back what it holds."""
