"""What crosses a boundary: adapters, wire format, run configuration, messages. No I/O."""
