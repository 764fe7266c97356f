"""What happens where the records are: contract, tuning, privacy, ledger, Flower ClientApp."""
