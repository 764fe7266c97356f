"""Names the installed package to Flower."""
