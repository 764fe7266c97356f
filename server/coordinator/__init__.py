"""The coordinator as a service: its folder, the door, the processes, runs that resume."""
