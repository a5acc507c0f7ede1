"""services puts answers on the network: the gRPC services on Ray Serve, their client, and the `chatforge` command."""
