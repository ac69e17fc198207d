"""Direct connections and shared memory: the edge beside gRPC."""
