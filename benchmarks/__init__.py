"""What is measured, against whom, and how: see harness.py."""
