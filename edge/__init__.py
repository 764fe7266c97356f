"""Devices: run and personalise without torch; export what they run."""
