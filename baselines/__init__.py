"""Plain networks, one family a file; found by listing."""
