"""The process shell that both worker roles share: gRPC, streams, health, drain, crash dump, metrics."""
