"""What a parameter is: one answer for readers, planning, adapters and rules."""
