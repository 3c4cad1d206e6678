"""Arithmetic on blocks of task vectors, the same bits for any block size, thread count and device."""
