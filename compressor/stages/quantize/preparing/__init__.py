"""Exact rewrites of a float graph, one kind a module."""
