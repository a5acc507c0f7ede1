"""serving answers from a model folder, inside one process: no network, no Ray, no protobuf."""
