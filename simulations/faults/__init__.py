"""Faults as data: lost messages, corrupt bytes, crashes, lying clients, a dying coordinator."""
