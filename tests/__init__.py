"""A regular package, so that no other package named `tests` on the path can take its place."""
