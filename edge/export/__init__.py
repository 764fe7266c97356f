"""From a torch model to what devices run."""
