"""A tiny prompt-switchable video model, trained from scratch on procedurally drawn clips (docs/model.md)."""
