"""Processes of one run: which strategies work, what ranks must agree on, and weights split over them."""
