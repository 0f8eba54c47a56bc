"""The three networks in PyTorch, with every cache as an explicit input and output."""
