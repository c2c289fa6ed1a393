"""The steps of a recipe, one file each; each skips what is done and still valid."""
