"""Between devices and a coordinator: gRPC with mTLS below, one Flower client above."""
