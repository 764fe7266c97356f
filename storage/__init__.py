"""What is written to this machine's disk: files whole or not at all, and hash-chained ledgers."""
