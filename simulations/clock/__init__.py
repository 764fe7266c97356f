"""Virtual time: what a round costs the devices that take part in it."""
