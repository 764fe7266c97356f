"""A site's long-lived process: identity, joining, preflight, and the work it is asked for."""
