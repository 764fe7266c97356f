"""How the values of a delta are written on their way to the coordinator."""
