"""The commands: what is given to each, what it means here, and how a refusal is told."""
