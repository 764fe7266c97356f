"""Clinical coding by four hospitals, end to end."""
