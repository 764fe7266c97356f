"""The cohort engine: many clients trained together over one frozen base."""
