"""Defenses, one paper a file; found by listing."""
