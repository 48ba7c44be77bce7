"""Runs that a user copies and owns."""
