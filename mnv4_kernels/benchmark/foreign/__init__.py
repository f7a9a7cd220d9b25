"""Files that also run by path in another environment's Python, without this package: they import none of it."""
