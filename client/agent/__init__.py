"""The long-lived process of a site: its identity, joining, preflight, and the work it is asked for."""
