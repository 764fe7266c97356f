"""What a run guarantees about privacy: as data, in words, as JSON; and what else is released."""
