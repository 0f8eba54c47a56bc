"""Generated code of the service's protocol, generation.proto; written by `make proto`."""
