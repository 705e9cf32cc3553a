"""Generated protobuf stubs of the wire; the sources are the `.proto` files in this folder."""

PROTOCOL_VERSION = 1
