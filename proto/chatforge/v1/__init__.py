"""Version 1 of the contract. `make proto` writes the *_pb2 modules beside the .proto files."""
